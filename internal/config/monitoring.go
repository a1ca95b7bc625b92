package config

// Monitoring is the HTTP server for health checks and metrics.
type Monitoring struct {
	// Listen is its "host:port". Empty, the default, means that there is none. Port 0
	// takes any free port.
	Listen string
}

// monitoring reads the value of the key monitoring.
func (v value) monitoring(m *Monitoring) {
	seen := v.mapping(map[string]func(value){
		"listen": func(v value) { m.Listen = v.address() },
	})
	if !seen["listen"] {
		v.mistake("names no address; write listen: 127.0.0.1:9222, or leave monitoring out")
	}
}
