package daemon

import (
	"context"
	"fmt"
	mathrand "math/rand/v2"
	"path/filepath"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/revoked"
)

const (
	// folderInterval is the time between two readings of the revoked users in a folder,
	// which a draining gateway and its successor share. A table is read as often as
	// heartbeats are written.
	folderInterval = 5 * time.Second

	// firstRead bounds the time in which a gateway that starts tries to read them.
	firstRead = 30 * time.Second
)

// readRevoked makes the list of revoked users and reads it, since no login may be accepted
// before. There may be no earlier copy on this machine, so an error must end the start.
func (d *Daemon) readRevoked(ctx context.Context, stateDir string) error {
	d.revoked = &revoked.List{Store: revoked.Folder(filepath.Join(stateDir, "revoked")), Log: d.log}
	if d.table == nil {
		return d.revoked.Refresh(ctx)
	}
	d.revoked.Store = d.table
	ctx, cancel := context.WithTimeout(ctx, firstRead)
	defer cancel()
	for {
		err := d.revoked.Refresh(ctx)
		if err == nil {
			return nil
		}
		d.log.Error("cannot read the revoked users; no login is accepted before", "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return fmt.Errorf("%w; without them, users that are revoked could log in", err)
		}
	}
}

// refreshRevoked reads the revoked users again and again until ctx ends. A revocation at
// another gateway is usually known before, because that one asks for a reading.
func (d *Daemon) refreshRevoked(ctx context.Context) {
	for {
		wait := folderInterval
		if d.table != nil {
			wait = beatInterval*3/4 + mathrand.N(beatInterval/2)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		err := safely(func() error {
			ctx, cancel := context.WithTimeout(ctx, beatInterval)
			defer cancel()
			return d.revoked.Refresh(ctx)
		})
		if err != nil && ctx.Err() == nil {
			d.log.Error("cannot read the revoked users; the last copy stays in force", "err", err)
		}
	}
}
