"""The Kac flow and its distillation, in plain PyTorch: no Ray, no MLflow, no endpoint store."""
