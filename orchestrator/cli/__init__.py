"""What `bespoke` can do, command by command; `cli` puts them together."""
