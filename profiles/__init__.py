"""Machine profiles shipped with Meshwright, one TOML file each, every figure with its provenance."""
