"""Fine-tuning: `fit` around transformers' Trainer, and what makes its steps quicker or smaller."""
