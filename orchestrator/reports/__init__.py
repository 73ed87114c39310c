"""Tables, figures, sample galleries and HTML reports of sweeps and evaluations."""
