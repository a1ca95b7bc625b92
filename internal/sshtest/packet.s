// For functions without a body; see packet.go.
