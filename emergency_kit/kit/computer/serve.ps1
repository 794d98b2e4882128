# Serves the kit's page on this computer alone, for Windows without Python. Run by start-windows.bat. Not run by us: see docs/Kit.md.
$root = (Get-Item (Join-Path $PSScriptRoot '..')).FullName
$types = @{ '.html' = 'text/html; charset=utf-8'; '.js' = 'text/javascript'; '.css' = 'text/css'; '.json' = 'application/json'; '.svg' = 'image/svg+xml'; '.wasm' = 'application/wasm'; '.webmanifest' = 'application/manifest+json'; '.txt' = 'text/plain; charset=utf-8' }
$listener = New-Object System.Net.HttpListener
$listener.Prefixes.Add('http://localhost:8765/')
try { $listener.Start() } catch { Write-Host 'Port 8765 is taken; close what uses it.'; exit 1 }
Write-Host 'The page: http://localhost:8765/page/   (close this window to stop)'
Start-Process 'http://localhost:8765/page/'
while ($listener.IsListening) {
  $context = $listener.GetContext()
  $path = [Uri]::UnescapeDataString($context.Request.Url.AbsolutePath)
  if ($path.EndsWith('/')) { $path += 'index.html' }
  $file = [IO.Path]::GetFullPath((Join-Path $root $path.TrimStart('/')))
  $answer = $context.Response
  $answer.Headers.Add('Cross-Origin-Opener-Policy', 'same-origin')
  $answer.Headers.Add('Cross-Origin-Embedder-Policy', 'require-corp')
  try {
    if ($file.StartsWith($root + [IO.Path]::DirectorySeparatorChar) -and [IO.File]::Exists($file)) {
      $type = $types[[IO.Path]::GetExtension($file)]
      if ($type) { $answer.ContentType = $type } else { $answer.ContentType = 'application/octet-stream' }
      $stream = [IO.File]::OpenRead($file)
      $answer.ContentLength64 = $stream.Length
      if ($context.Request.HttpMethod -ne 'HEAD') { $stream.CopyTo($answer.OutputStream) }
      $stream.Close()
    } else { $answer.StatusCode = 404 }
    $answer.Close()
  } catch { $answer.Abort() }
}
