"""Other inference engines. Importing this imports none of them."""
