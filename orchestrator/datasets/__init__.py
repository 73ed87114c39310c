"""Dataset plugins (conditioning sources and reference sets), one module each; the module name is the plugin name."""
