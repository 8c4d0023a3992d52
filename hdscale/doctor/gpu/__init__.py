"""What a first hour on a GPU must find out: `hdscale doctor --gpu`."""
