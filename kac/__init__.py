"""The Kac flow and its distillation in plain PyTorch. Independent of Ray and MLflow."""
