"""The commands of `bespoke`, grouped by topic; `main` assembles them."""
