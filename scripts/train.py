"""`emergency-kit train` as a script; all flags: --help."""

try:
    from emergency_kit.cli import main
except ImportError as error:
    raise SystemExit(f"error: {error}: this is not the project's Python. Next: source activate_env.sh, then the same command") from None
main("train")
