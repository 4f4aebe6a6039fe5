"""What is kept from one computed step to the next, and what it stands in for."""
