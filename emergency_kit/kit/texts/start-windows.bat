@echo off
rem Emergency Kit: opens the kit's page on this computer alone. Nothing is installed, nothing is sent anywhere.
rem With Python the model runs faster; without it Windows' own PowerShell serves the page.
cd /d "%~dp0"
for %%h in (native page) do (
  for %%p in ("py -3.13" "py -3.12" "py -3.11" "py -3" "python") do (
    %%~p computer\start.py --fits %%h >nul 2>nul && ( %%~p computer\start.py %* & goto :end )
  )
)
powershell -NoProfile -ExecutionPolicy Bypass -File computer\serve.ps1
if errorlevel 1 start "" cards.html
:end
