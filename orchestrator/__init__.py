"""The parts of a distillation run: models, pairs, hosts, metrics, tracking, reports. Never imports ``sweeps``."""
