package daemon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/dynamo"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
)

const (
	// beatInterval is the time between two heartbeats.
	beatInterval = 30 * time.Second

	// maxSilence is the age of a heartbeat from which on its gateway is taken for
	// ended. It exceeds a pause of a machine, or of its network, after which its
	// connections may still be alive.
	maxSilence = 10 * time.Minute

	// forgetAfter is the age at which a heartbeat is removed.
	forgetAfter = 24 * time.Hour
)

// gatewayID returns a name for this process that no other process has.
func gatewayID() string {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "gateway"
	}
	return host + "-" + strings.ToLower(rand.Text()[:6])
}

// beat writes this gateway's heartbeat to the table until ctx ends, and then
// removes it. It logs which gateways have other settings, if these change.
func (d *Daemon) beat(ctx context.Context) {
	differing := ""
	for {
		err := safely(func() (err error) {
			differing, err = d.beatOnce(ctx, differing)
			return err
		})
		if err != nil && ctx.Err() == nil {
			d.log.Error("cannot write this gateway's heartbeat; trying again", "err", err)
		}
		select {
		case <-time.After(beatInterval*3/4 + mathrand.N(beatInterval/2)):
		case <-ctx.Done():
			leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := d.table.Leave(leave, d.id); err != nil {
				d.log.Warn("cannot remove this gateway's heartbeat", "err", err)
			}
			return
		}
	}
}

// beatOnce writes a heartbeat. It returns the IDs of the gateways with other
// settings, and logs them unless they are the ones before.
func (d *Daemon) beatOnce(ctx context.Context, before string) (differing string, err error) {
	ctx, cancel := context.WithTimeout(ctx, beatInterval)
	defer cancel()
	mine := d.heartbeat()
	err = d.table.Beat(ctx, mine)
	d.ledgerHealth.observe(err)
	if err != nil {
		return before, err
	}
	all, err := d.fleet.read(ctx)
	if err != nil {
		return before, err
	}
	var others []string
	for _, g := range all {
		switch silence := time.Since(g.Seen); {
		case silence > forgetAfter:
			if err := d.table.Leave(ctx, g.ID); err != nil {
				return before, err
			}
		case silence < maxSilence && g.Settings != mine.Settings:
			others = append(others, g.ID)
		}
	}
	differing = strings.Join(others, " ")
	if differing != before && differing != "" {
		d.log.Warn("gateways that share the table have other keys or profiles than this one", "gateways", differing)
	}
	return differing, nil
}

func (d *Daemon) heartbeat() dynamo.Gateway {
	connections := 0
	for _, c := range d.server.Connections() {
		if c.Identity.Via == "" { // not another gateway's
			connections++
		}
	}
	return dynamo.Gateway{
		ID:          d.id,
		Version:     d.Version,
		Address:     d.advertised(),
		Settings:    *d.settingsHash.Load(),
		Draining:    d.Draining(),
		Connections: connections,
		Started:     d.started,
		Seen:        time.Now(),
	}
}

// advertised returns the address at which other gateways reach this one: that of the
// configuration, or the one of the first listener.
func (d *Daemon) advertised() string {
	if address := d.cfg.Load().Advertise; address != "" {
		return address
	}
	if address := d.address.Load(); address != nil {
		return *address
	}
	return ""
}

// alone returns an error if another gateway may be connected to bastions of the
// same table. It is the dialer's Alone.
func (d *Daemon) alone(ctx context.Context) error {
	all, err := d.table.Gateways(ctx)
	if err != nil {
		return fmt.Errorf("asking for other gateways: %w", err)
	}
	for _, g := range all {
		if silence := time.Since(g.Seen); g.ID != d.id && silence < maxSilence {
			return fmt.Errorf("the gateway %s may be connected to it; its last heartbeat was %v ago", g.ID, silence.Round(time.Second))
		}
	}
	return nil
}

// settingsHash returns a hash of the settings in which all gateways of a deployment
// must agree: keys, and the profiles.
func settingsHash(cfg *config.Gateway) (string, error) {
	type profile struct {
		Bastion bastion.ProfileOptions
		Fargate fargate.Options
	}
	settings := struct {
		FleetKeys, HostKeys []string
		Profiles            map[string]profile
	}{Profiles: map[string]profile{}}
	for _, key := range cfg.FleetKeys {
		settings.FleetKeys = append(settings.FleetKeys, ssh.FingerprintSHA256(key.PublicKey()))
	}
	for _, key := range cfg.HostKeys {
		settings.HostKeys = append(settings.HostKeys, ssh.FingerprintSHA256(key.PublicKey()))
	}
	slices.Sort(settings.HostKeys)
	for name, p := range cfg.Profiles {
		settings.Profiles[name] = profile{p.ProfileOptions, p.Fargate}
	}
	text, err := json.Marshal(settings)
	if err != nil {
		return "", fmt.Errorf("hashing the settings: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8]), nil
}
