package bastion

import (
	"sync"
	"time"
)

// Counts are the numbers of a profile's bastions.
type Counts struct {
	// Starting are being started by this Dialer.
	Starting int
	// Running were found running by the last Sweep, or by this Dialer since. One that
	// ends by itself, or that another gateway starts, is counted at the next Sweep.
	Running int
}

// Counts returns the numbers by profile. It calls neither the ledger nor a launcher, so it
// may be called often.
func (d *Dialer) Counts() map[string]Counts {
	all := map[string]Counts{}
	running := d.present.count()
	for name := range d.settings().Profiles {
		all[name] = Counts{Running: running[name]}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for owner := range d.starting {
		if n, configured := all[owner.Profile]; configured {
			n.Starting++
			all[owner.Profile] = n
		}
	}
	return all
}

// present are the tasks that run, as far as they are known without a call. The zero value is
// empty.
type present struct {
	mu    sync.Mutex
	tasks map[Owner]presentTask
}

type presentTask struct {
	id    string
	since time.Time // when it was found
}

func (p *present) put(owner Owner, taskID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tasks == nil {
		p.tasks = make(map[Owner]presentTask)
	}
	p.tasks[owner] = presentTask{taskID, time.Now()}
}

// observe adds or removes the task of an event.
func (p *present) observe(e Event) {
	switch e.Kind {
	case Started, Adopted:
		if e.Task.Addr != "" { // else it is adopted while it starts
			p.put(e.Owner, e.Task.ID)
		}
	case Ended, Stopped:
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.tasks[e.Owner].id == e.Task.ID {
			delete(p.tasks, e.Owner)
		}
	}
}

// replace makes the listed tasks those of the profile. Tasks that were found since the
// listing began stay.
func (p *present) replace(profile string, listed []OwnedTask, began time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for owner, task := range p.tasks {
		if owner.Profile == profile && task.since.Before(began) {
			delete(p.tasks, owner)
		}
	}
	if p.tasks == nil {
		p.tasks = make(map[Owner]presentTask)
	}
	for _, found := range listed {
		if _, newer := p.tasks[found.Owner]; newer || found.Owner.Profile != profile || found.Task.Addr == "" {
			continue
		}
		p.tasks[found.Owner] = presentTask{found.Task.ID, began}
	}
}

// count returns the number of tasks by profile.
func (p *present) count() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := map[string]int{}
	for owner := range p.tasks {
		n[owner.Profile]++
	}
	return n
}
