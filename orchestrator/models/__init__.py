"""Model adapter plugins, one module each; the module name is the plugin name."""
