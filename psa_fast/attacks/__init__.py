"""How well a guard holds: what cameras, editors, users and attackers do to a request, measured on the real guard."""
