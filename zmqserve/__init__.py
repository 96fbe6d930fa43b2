"""Language models over ZeroMQ: a controller, workers and clients."""
