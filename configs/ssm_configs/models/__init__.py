"""What a model is to the operators: the configs it is read from, the launch configs it reaches, and how these are warmed."""
