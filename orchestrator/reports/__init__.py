"""Tables, figures, galleries and HTML reports of finished work."""
