package account

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Unlimited is RLIM_INFINITY.
const Unlimited = ^uint64(0)

// A Limit is the limit of one resource. Soft counts if SetSoft is true, and Hard if
// SetHard is.
type Limit struct {
	Resource         int // RLIMIT_*
	Soft, Hard       uint64
	SetSoft, SetHard bool
}

// Limits are the settings of an account in limits.conf(5).
type Limits struct {
	Resources []Limit
	// Priority is the nice value, if SetPriority is true.
	Priority    int
	SetPriority bool
	// NoNewPrivs sets no_new_privs (prctl(2), PR_SET_NO_NEW_PRIVS).
	NoNewPrivs bool
}

// The files of pam_limits(8).
const (
	limitsFile    = "/etc/security/limits.conf"
	limitsPattern = "/etc/security/limits.d/*.conf"
)

// Limits returns the account's limits from the files of pam_limits(8). Malformed lines are
// ignored and returned as problems, as are maxlogins and maxsyslogins, which are not
// supported because nothing counts logins here. chroot is not supported either; it is an
// error, because an account that it should confine must not run without it.
func (a Account) Limits() (l Limits, problems []string, err error) {
	files := []string{limitsFile}
	more, _ := filepath.Glob(limitsPattern) // sorted
	files = append(files, more...)
	p := limitsParser{account: a, inGroup: inGroup}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return Limits{}, nil, err
		}
		if done := p.parse(file, string(text)); done {
			return Limits{}, p.problems, p.err
		}
	}
	l = p.limits()
	for i, r := range l.Resources {
		if r.Resource == unix.RLIMIT_NOFILE && !r.SetSoft {
			// A Go program raises its own soft limit when it starts, but not that of
			// its children. A child knows the original.
			if out, err := runTool("sh", "-c", "ulimit -S -n"); err == nil {
				n, err := strconv.ParseUint(strings.TrimSpace(string(out)), 10, 64)
				l.Resources[i].Soft, l.Resources[i].SetSoft = n, err == nil
			}
		}
	}
	return l, p.problems, p.err
}

// inGroup reports whether the group with that name has one of these ids.
func inGroup(name string, gids []uint32) bool {
	text, err := os.ReadFile("/etc/group")
	if err != nil {
		return false
	}
	match := func(text string) (found, matches bool) {
		for line := range strings.Lines(text) {
			f := strings.Split(line, ":")
			if len(f) < 3 || f[0] != name {
				continue
			}
			gid, err := strconv.ParseUint(f[2], 10, 32)
			return true, err == nil && slices.Contains(gids, uint32(gid))
		}
		return false, false
	}
	found, matches := match(string(text))
	if !found {
		if out, err := getent("group", name); err == nil {
			_, matches = match(string(out))
		}
	}
	return matches
}

// A scope says how specific the domain of a line is. If two lines set an item, the more
// specific one applies; if they are equally specific, the later one.
type scope int

const (
	scopeUser scope = iota
	scopeGroup
	scopeAll
	scopeOther // the line is not about the account
)

// A setting is a value of one item, and the scope of its line.
type setting struct {
	value uint64
	from  scope
}

// A limitsParser collects the settings of an account.
type limitsParser struct {
	account    Account
	inGroup    func(name string, gids []uint32) bool
	soft, hard map[int]setting // by resource
	priority   setting
	noNewPrivs setting
	problems   []string
	err        error
}

// An item of limits.conf(5) is a resource, and the size of the unit of its values.
type item struct {
	resource int
	unit     uint64
}

var items = map[string]item{
	"core": {unix.RLIMIT_CORE, 1024}, "data": {unix.RLIMIT_DATA, 1024}, "fsize": {unix.RLIMIT_FSIZE, 1024},
	"memlock": {unix.RLIMIT_MEMLOCK, 1024}, "rss": {unix.RLIMIT_RSS, 1024}, "stack": {unix.RLIMIT_STACK, 1024}, "as": {unix.RLIMIT_AS, 1024},
	"cpu": {unix.RLIMIT_CPU, 60}, "nofile": {unix.RLIMIT_NOFILE, 1}, "nproc": {unix.RLIMIT_NPROC, 1}, "locks": {unix.RLIMIT_LOCKS, 1},
	"sigpending": {unix.RLIMIT_SIGPENDING, 1}, "msgqueue": {unix.RLIMIT_MSGQUEUE, 1}, "nice": {unix.RLIMIT_NICE, 1}, "rtprio": {unix.RLIMIT_RTPRIO, 1},
}

// parse reads one file. It reports true if a line exempts the account from all limits.
func (p *limitsParser) parse(file, text string) (exempt bool) {
	if p.soft == nil {
		p.soft, p.hard = map[int]setting{}, map[int]setting{}
		p.priority.from, p.noNewPrivs.from = scopeOther, scopeOther
	}
	number := 0
	for line := range strings.Lines(text) {
		number++
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		from := p.scopeOf(f[0])
		if from == scopeOther {
			continue
		}
		problem := func(format string, args ...any) {
			p.problems = append(p.problems, fmt.Sprintf("%s:%d: ", file, number)+fmt.Sprintf(format, args...))
		}
		switch {
		case len(f) == 2 && f[1] == "-" && from < scopeAll:
			return true
		case len(f) != 4:
			problem("want a domain, a type, an item and a value")
			continue
		}
		kind, name, value := strings.ToLower(f[1]), strings.ToLower(f[2]), strings.ToLower(f[3])
		if kind != "soft" && kind != "hard" && kind != "-" {
			problem("%q is not soft, hard or -", f[1])
			continue
		}
		switch name {
		case "maxlogins", "maxsyslogins":
			problem("%s is not supported", name)
			continue
		case "chroot":
			p.err = fmt.Errorf("%s:%d: chroot is not supported", file, number)
			continue
		case "nonewprivs":
			if value != "0" && value != "1" {
				problem("%q is not 0 or 1", f[3])
			} else if from <= p.noNewPrivs.from {
				p.noNewPrivs = setting{uint64(value[0] - '0'), from}
			}
			continue
		case "priority":
			if n, err := strconv.ParseInt(value, 10, 32); err != nil {
				problem("%q is not a nice value", f[3])
			} else if from <= p.priority.from {
				p.priority = setting{uint64(min(max(n, -20), 19)), from}
			}
			continue
		}
		it, ok := items[name]
		if !ok {
			problem("%q is not an item", f[2])
			continue
		}
		n, err := it.value(value)
		if err != nil {
			problem("%q is not a value of %s", f[3], name)
			continue
		}
		for _, s := range []struct {
			kind string
			to   map[int]setting
		}{{"soft", p.soft}, {"hard", p.hard}} {
			if before, set := s.to[it.resource]; (kind == s.kind || kind == "-") && (!set || from <= before.from) {
				s.to[it.resource] = setting{n, from}
			}
		}
	}
	return false
}

// value parses a value in units of the item.
func (it item) value(s string) (uint64, error) {
	unlimited := s == "-1" || s == "-" || s == "unlimited" || s == "infinity"
	switch it.resource {
	case unix.RLIMIT_NICE:
		n := int64(-1)
		if !unlimited {
			var err error
			if n, err = strconv.ParseInt(s, 10, 32); err != nil {
				return 0, err
			}
		}
		return uint64(20 - min(max(n, -20), 19)), nil // setrlimit(2), RLIMIT_NICE
	case unix.RLIMIT_NOFILE:
		if unlimited { // the kernel has no RLIM_INFINITY for this resource
			text, err := os.ReadFile("/proc/sys/fs/nr_open")
			if err != nil {
				return 0, err
			}
			return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		}
	}
	if unlimited {
		return Unlimited, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, err
	}
	if n > Unlimited/it.unit {
		return Unlimited, nil
	}
	return n * it.unit, nil
}

// scopeOf returns the scope of a domain. Only a line with root's name applies to root:
// groups, ranges and * do not.
func (p *limitsParser) scopeOf(d string) scope {
	a := p.account
	root := a.UID == 0
	switch {
	case d == a.Name:
		return scopeUser
	case root:
		return scopeOther
	case d == "*":
		return scopeAll
	case strings.HasPrefix(d, "%"): // maxlogins of a group, all together
		return scopeOther
	case strings.HasPrefix(d, "@"):
		d = d[1:]
		gids := append([]uint32{a.GID}, a.Groups...)
		if within, ok := inRange(d); ok {
			if slices.ContainsFunc(gids, within) {
				return scopeGroup
			}
			return scopeOther
		}
		if p.inGroup(d, gids) {
			return scopeGroup
		}
	default:
		if within, ok := inRange(d); ok && within(a.UID) {
			return scopeUser
		}
	}
	return scopeOther
}

// inRange parses the ranges of pam_limits: min:max; min:, which has no upper bound; and
// :max, which is max alone.
func inRange(s string) (within func(uint32) bool, ok bool) {
	lo, hi, ok := strings.Cut(s, ":")
	if !ok || lo == "" && hi == "" {
		return nil, false
	}
	parse := func(s string, otherwise uint64) (uint64, bool) {
		if s == "" {
			return otherwise, true
		}
		n, err := strconv.ParseUint(s, 10, 32)
		return n, err == nil
	}
	most, ok1 := parse(hi, 1<<32-1)
	least, ok2 := parse(lo, most)
	if !ok1 || !ok2 {
		return nil, false
	}
	return func(id uint32) bool { return least <= uint64(id) && uint64(id) <= most }, true
}

// limits returns the settings of the files that were parsed.
func (p *limitsParser) limits() Limits {
	var l Limits
	for resource := range 16 { // RLIMIT_NLIMITS
		soft, setSoft := p.soft[resource]
		hard, setHard := p.hard[resource]
		if setSoft || setHard {
			l.Resources = append(l.Resources, Limit{resource, soft.value, hard.value, setSoft, setHard})
		}
	}
	if p.soft != nil && p.priority.from != scopeOther {
		l.Priority, l.SetPriority = int(int64(p.priority.value)), true
	}
	l.NoNewPrivs = p.soft != nil && p.noNewPrivs.from != scopeOther && p.noNewPrivs.value == 1
	return l
}
