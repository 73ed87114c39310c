"""Everything a distillation run is made of: models, pairs, hosts, metrics, tracking, reports. Never imports sweeps."""
