"""What interruptions cost a training script: this project's, and timm's beside it."""
