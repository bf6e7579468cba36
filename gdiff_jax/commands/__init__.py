"""The commands: flags made from settings, help, exit codes."""
