"""Small networks of every kind, as their authors have them: code of their own, trained checkpoints, a configuration."""
