"""The socket-free code of controllers, workers and clients on a simulated network, clock and faults, all from one seed."""
