"""Every metric defined once, and the tables and figures made of them."""
