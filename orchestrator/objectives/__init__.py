"""What a distillation minimises, one objective a file, found by module name."""
