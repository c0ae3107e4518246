"""One module per `rollout-spec` command, named after it, holding a click command named `command`."""
