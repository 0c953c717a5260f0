"""What models cost and what they see: tables and figures about networks, made from `models` and `data` alone."""
