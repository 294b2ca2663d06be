"""A machine judge as a voter: it chooses between stored answers, and its choices only train."""
