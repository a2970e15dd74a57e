"""Pure mathematics: tensors (or parsed data) in, tensors out; no paths, no YAML, no Prefect, no DVC."""
