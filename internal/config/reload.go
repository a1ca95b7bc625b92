package config

import "slices"

// checkFixed reports settings that differ between g and running and require a
// restart: the sockets, the folder and the names by which the gateway finds its
// bastions, and the audit log, which must end with an event. v is the whole file,
// from which g was read.
func (v value) checkFixed(g, running *Gateway) {
	fixed := func(key string, same bool) {
		if !same {
			v.add(v.lineOf(key), "%s: cannot be changed while the gateway runs; restart it", key)
		}
	}
	fixed("listen", slices.Equal(g.Listen, running.Listen))
	fixed("state_dir", g.StateDir == running.StateDir)
	fixed("ledger", g.Ledger == running.Ledger)
	fixed("deployment", g.Deployment == running.Deployment)
	fixed("monitoring", g.Monitoring == running.Monitoring)
	fixed("tracing", g.Tracing == running.Tracing)
	fixed("api", slices.Equal(g.API.Listen, running.API.Listen) && (g.API.Certificate == nil) == (running.API.Certificate == nil))
	fixed("audit", g.Audit == running.Audit)

	onFargate := func(g *Gateway) bool {
		for _, p := range g.Profiles {
			if p.Launcher == "fargate" {
				return true
			}
		}
		return false
	}
	for name, p := range g.Profiles {
		if was, ok := running.Profiles[name]; ok && was.Launcher != p.Launcher {
			v.add(v.lineOf("profiles"), "profiles.%s.launcher: cannot be changed while the gateway runs; restart it", name)
		}
	}
	// The ledger of a gateway without Fargate is in memory.
	if onFargate(g) && !onFargate(running) {
		v.add(v.lineOf("profiles"), "profiles: the first profile on Fargate needs a restart of the gateway")
	}
}
