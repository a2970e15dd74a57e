"""The stages of the pipeline, one module per stage of dvc.yaml, between artifacts on disk and `tasks.algorithms`."""
