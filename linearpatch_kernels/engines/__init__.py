"""Where people run models: a module, or a folder, of this room knows one engine, and no other module knows it."""
