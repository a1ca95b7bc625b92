package config

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Network is where connections come from, and whom the gateway turns away for
// that.
type Network struct {
	// ProxyProtocolFrom (in the file: proxy_protocol_from) are the addresses
	// and networks of balancers, whose connections must begin with a header of
	// the PROXY protocol. One or a list; "none", the default, means that there
	// are none.
	ProxyProtocolFrom []netip.Prefix

	// PerSourceNetBlockSize is what counts as one source. Default 32:64.
	PerSourceNetBlockSize NetBlockSize
	// PerSourcePenalties are for sources whose logins fail. In the file they
	// are in the words of sshd_config(5), as in "authfail:10s max:1h", on one
	// line or as a list; "none" means no penalties. Default as with sshd.
	PerSourcePenalties Penalties
	// PerSourcePenaltyExemptList are the addresses and networks that get
	// none. One or a list, or "none", which is the default.
	PerSourcePenaltyExemptList []netip.Prefix
}

// NetBlockSize is how many leading bits of an address make a source. One number
// in the file is for IPv4, two with a colon are for IPv4 and IPv6.
type NetBlockSize struct{ IPv4, IPv6 int }

// Penalties are what is added to a source's penalty when a connection of it ends
// without a login, and the bounds of that. All durations are from 0 to a day; a
// Max of zero means no penalties.
type Penalties struct {
	AuthFail, NoAuth, GraceExceeded, RefuseConnection, Crash time.Duration
	Max, Min                                                 time.Duration
	// MaxSources4 and MaxSources6 are how many sources are remembered, from 1
	// to a million. DenyAll4 and DenyAll6 refuse everybody when there are more,
	// in place of forgetting some.
	MaxSources4, MaxSources6 int
	DenyAll4, DenyAll6       bool
}

// StartRate is how many starts there may be within a time; the zero value means
// no limit.
type StartRate struct {
	Starts int
	Per    time.Duration
}

func defaultNetwork() Network {
	return Network{
		PerSourceNetBlockSize: NetBlockSize{IPv4: 32, IPv6: 64},
		PerSourcePenalties:    defaultPenalties(),
	}
}

func defaultPenalties() Penalties {
	return Penalties{
		AuthFail: 5 * time.Second, NoAuth: time.Second, GraceExceeded: 10 * time.Second, RefuseConnection: 10 * time.Second, Crash: 90 * time.Second,
		Max: 10 * time.Minute, Min: 15 * time.Second,
		MaxSources4: 65536, MaxSources6: 65536,
	}
}

func (v value) networksOrNone() []netip.Prefix {
	if v.is("none") {
		return nil
	}
	return v.networks()
}

// balancers reads who may say whose a connection is.
func (v value) balancers() []netip.Prefix {
	networks := v.networksOrNone()
	for _, p := range networks {
		if p.IsValid() && p.Bits() == 0 {
			v.mistake("%s is everybody, so anybody could claim to come from any address; name the balancers only", p)
		}
	}
	return networks
}

// netBlockSize reads bits, or bits:bits.
func (v value) netBlockSize() NetBlockSize {
	size := defaultNetwork().PerSourceNetBlockSize
	s, ok := v.text()
	if !ok {
		return size
	}
	four, six, both := strings.Cut(s, ":")
	bits := func(s string, most int) int {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > most || strings.TrimLeft(s, "0123456789") != "" {
			ok = false
		}
		return n
	}
	size.IPv4 = bits(four, 32)
	if both {
		size.IPv6 = bits(six, 128)
	}
	if ok && size == (NetBlockSize{}) {
		v.mistake("%q makes one source of all addresses, so that a stranger could have everybody turned away", s)
	}
	if !ok {
		v.mistake("%q is not the bits of a network; write it like 32:64, up to 32 for IPv4 and 128 for IPv6", s)
	}
	return size
}

// penalties reads what PerSourcePenalties of sshd_config(5) has after it.
func (v value) penalties() Penalties {
	p := defaultPenalties()
	if v.is("none") {
		return Penalties{}
	}
	durations := map[string]*time.Duration{
		"authfail": &p.AuthFail, "noauth": &p.NoAuth, "grace-exceeded": &p.GraceExceeded, "refuseconnection": &p.RefuseConnection,
		"crash": &p.Crash, "max": &p.Max, "min": &p.Min,
	}
	numbers := map[string]*int{"max-sources4": &p.MaxSources4, "max-sources6": &p.MaxSources6}
	overflows := map[string]*bool{"overflow": &p.DenyAll4, "overflow6": &p.DenyAll6}
	seen := map[string]bool{}
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		words := strings.Fields(s)
		if len(words) == 0 {
			v.mistake("is empty; write none for no penalties")
		}
		for _, word := range words {
			name, what, ok := strings.Cut(word, ":")
			duration, number, overflow := durations[name], numbers[name], overflows[name]
			switch {
			case !ok || duration == nil && number == nil && overflow == nil:
				v.mistake("%q is not a penalty; write it like authfail:5s. There are authfail, noauth, grace-exceeded, refuseconnection, crash, max, min, max-sources4, max-sources6, overflow and overflow6", word)
			case seen[name]:
				v.mistake("%s is given twice", name)
			case duration != nil:
				d, err := parseDuration(what)
				if err != nil || d > 24*time.Hour {
					v.mistake("%q: %q is not a duration of a day at most; write it like 90s", word, what)
				}
				*duration = d
			case number != nil:
				n, err := strconv.Atoi(what)
				if err != nil || n < 1 || n > 1_000_000 {
					v.mistake("%q: %q is not a whole number from 1 to 1000000", word, what)
				}
				*number = n
			case what != "permissive" && what != "deny-all":
				v.mistake("%q: there are permissive and deny-all", word)
			default:
				*overflow = what == "deny-all"
			}
			seen[name] = true
		}
	}
	if !seen["overflow6"] {
		p.DenyAll6 = p.DenyAll4
	}
	if p.Max < p.Min || p.Max == 0 {
		v.mistake("max (%v) is shorter than min (%v), so that no penalty would ever count; write none for no penalties", p.Max, p.Min)
	}
	return p
}

// startRate reads starts/duration.
func (v value) startRate() StartRate {
	if v.is("none") {
		return StartRate{}
	}
	s, ok := v.text()
	if !ok {
		return StartRate{}
	}
	count, per, _ := strings.Cut(s, "/")
	n, err := strconv.Atoi(count)
	d, perErr := parseDuration(per)
	if err != nil || perErr != nil || n < 1 || n > 1000 || d < time.Second || d > 7*24*time.Hour {
		v.mistake("%q is not a number of starts in a time; write it like 30/1h, with at most 1000 starts in at most a week", s)
		return StartRate{}
	}
	return StartRate{Starts: n, Per: d}
}
