package daemon

import (
	"cmp"
	"context"
	"net"

	"github.com/sallyport-ssh/sallyport/internal/api"
	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// newAPI makes the HTTP API. The port of the SSH server is known.
func (d *Daemon) newAPI() *api.Server {
	for _, ln := range d.API {
		d.log.Info("HTTP API", "addr", ln.Addr().String(), "tls", d.parts.cfg.API.Certificate != nil)
	}
	a := &api.Server{
		Settings: d.apiSettings(d.parts),
		NewCall:  d.server.NewCall,
		Console:  d.users,
		Bastions: d.dialer,
		Log:      d.log,
	}
	if d.table != nil {
		a.Nonces = d.table
	}
	return a
}

func (d *Daemon) apiSettings(parts *parts) api.Settings {
	s := api.Settings{Options: parts.cfg.API.Options}
	s.SSHAddress = cmp.Or(s.SSHAddress, d.sshPort)
	for _, key := range parts.cfg.HostKeys {
		s.HostKeys = append(s.HostKeys, key.PublicKey())
	}
	return s
}

// serveAPI serves the HTTP API until ctx ends.
func (d *Daemon) serveAPI(ctx context.Context) {
	if err := d.api.Serve(ctx, d.API...); err != nil {
		d.log.Error("the HTTP API has ended", "err", err)
	}
}

// portOf returns ":port" of a listener's address.
func portOf(addr net.Addr) string {
	_, port, _ := net.SplitHostPort(identity.AddrPort(addr).String())
	return ":" + port
}
