package config

import (
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/gateway"
)

func defaultPenalties() gateway.Penalties {
	return gateway.Penalties{
		AuthFail: 5 * time.Second, NoAuth: time.Second, GraceExceeded: 10 * time.Second, Crash: 90 * time.Second,
		Max: 10 * time.Minute, Min: 15 * time.Second,
		MaxSources4: 65536, MaxSources6: 65536,
	}
}

// checkListeners reports an address that two servers are to listen at.
func (v value) checkListeners(g *Gateway) {
	used := map[string]string{} // address: key
	for _, server := range []struct {
		key       string
		addresses []string
	}{
		{"listen", g.Listen}, {"api", g.API.Listen}, {"monitoring", []string{g.Monitoring.Listen}},
	} {
		for _, addr := range server.addresses {
			if addr == "" || strings.HasSuffix(addr, ":0") {
				continue
			}
			if other, ok := used[addr]; ok && other != server.key {
				v.report.add(v.lineOf(server.key), "%s.listen: %s is also the address of %s", server.key, addr, other)
			}
			used[addr] = server.key
		}
	}
}

func (v value) networksOrNone() []netip.Prefix {
	if v.is("none") {
		return nil
	}
	return v.networks()
}

// balancers reads the networks that may send headers of the PROXY protocol.
func (v value) balancers() []netip.Prefix {
	networks := v.networksOrNone()
	for _, p := range networks {
		if p.IsValid() && p.Bits() == 0 {
			v.mistake("%s includes every client, so any client could claim any address; name the balancers only", p)
		}
	}
	return networks
}

// netBlockSize reads bits, or bits:bits.
func (v value) netBlockSize() gateway.NetBlockSize {
	size := gateway.NetBlockSize{IPv4: 32, IPv6: 64}
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
	if ok && size == (gateway.NetBlockSize{}) {
		v.mistake("%q makes one source of all addresses, so that one client could cause all others to be rejected", s)
	}
	if !ok {
		v.mistake("%q is not the bits of a network; write it like 32:64, up to 32 for IPv4 and 128 for IPv6", s)
	}
	return size
}

// penalties reads the arguments of PerSourcePenalties in sshd_config(5).
func (v value) penalties() gateway.Penalties {
	p := defaultPenalties()
	if v.is("none") {
		return gateway.Penalties{}
	}
	durations := map[string]*time.Duration{
		"authfail": &p.AuthFail, "noauth": &p.NoAuth, "grace-exceeded": &p.GraceExceeded,
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
			name, arg, ok := strings.Cut(word, ":")
			duration, number, overflow := durations[name], numbers[name], overflows[name]
			switch {
			case ok && name == "refuseconnection":
				v.mistake("refuseconnection: the gateway has no such penalty: it never rejects an address because a role does not permit a login; leave it out")
			case !ok || duration == nil && number == nil && overflow == nil:
				v.mistake("%q is not a penalty; write it like authfail:5s. There are authfail, noauth, grace-exceeded, crash, max, min, max-sources4, max-sources6, overflow and overflow6", word)
			case seen[name]:
				v.mistake("%s is given twice", name)
			case duration != nil:
				d, err := parseDuration(arg)
				if err != nil || d > 24*time.Hour {
					v.mistake("%q: %q is not a duration of a day at most; write it like 90s", word, arg)
				}
				*duration = d
			case number != nil:
				n, err := strconv.Atoi(arg)
				if err != nil || n < 1 || n > 1_000_000 {
					v.mistake("%q: %q is not a whole number from 1 to 1000000", word, arg)
				}
				*number = n
			case arg != "permissive" && arg != "deny-all":
				v.mistake("%q: there are permissive and deny-all", word)
			default:
				*overflow = arg == "deny-all"
			}
			seen[name] = true
		}
	}
	if !seen["overflow6"] {
		p.DenyAll6 = p.DenyAll4
	}
	if p.Max < p.Min || p.Max == 0 {
		v.mistake("max (%v) is shorter than min (%v), so that no penalty would have an effect; write none for no penalties", p.Max, p.Min)
	}
	return p
}

// startRate reads starts/duration.
func (v value) startRate() bastion.StartRate {
	if v.is("none") {
		return bastion.StartRate{}
	}
	s, ok := v.text()
	if !ok {
		return bastion.StartRate{}
	}
	count, per, _ := strings.Cut(s, "/")
	n, err := strconv.Atoi(count)
	d, perErr := parseDuration(per)
	if err != nil || perErr != nil || n < 1 || n > 1000 || d < time.Second || d > 7*24*time.Hour {
		v.mistake("%q is not a number of starts in a time; write it like 30/1h, with at most 1000 starts in at most a week", s)
		return bastion.StartRate{}
	}
	return bastion.StartRate{Starts: n, Per: d}
}
