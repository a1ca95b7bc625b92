package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/pires/go-proxyproto"
)

const (
	// proxyHeaderTimeout bounds the wait for a balancer's header, if
	// LoginGraceTime is not shorter. A balancer sends it before all else.
	proxyHeaderTimeout = 10 * time.Second
	// proxyHeaderMax bounds what follows the fixed part of a header of version
	// 2, in bytes: the addresses, and what the balancer likes to add.
	proxyHeaderMax = 4096
)

var (
	errNoProxyHeader      = errors.New("no PROXY protocol header came first, and proxy_protocol_from says that this address sends one")
	errProxyHeader        = errors.New("not a PROXY protocol header that can be used")
	errProxyHeaderTimeout = errors.New("the PROXY protocol header did not come in time")
)

// admitProxied finds out who the client is when nc comes from a balancer: the
// header that it must begin with says so. From anybody else nothing is read, and
// a header is what any other garbage is. It reports false when it has closed nc
// because there is nobody to serve.
//
// It reads no further than the header, so that nc stays the plain socket that
// package wire is fast on.
func (c *conn) admitProxied(ctx context.Context, nc net.Conn) bool {
	balancer := c.client.Addr()
	if !slices.ContainsFunc(c.ProxyProtocolFrom, func(p netip.Prefix) bool { return p.Contains(balancer) }) {
		return true
	}
	header, err := c.proxyHeader(ctx, nc)
	switch {
	case errors.Is(err, errNobody), ctx.Err() != nil:
		nc.Close()
		return false
	case err != nil:
		c.turnedAway(slog.LevelWarn, err)
		refuse(nc, proxyMessage)
		return false
	case header.Command.IsLocal():
		// A connection of the balancer's own, most likely to see whether
		// anybody is here.
		c.local = true
		return true
	}
	c.client, c.server = addrPort(header.SourceAddr), addrPort(header.DestinationAddr)
	c.log = c.Log.With("conn", c.ref, "remote", c.client.String(), "balancer", balancer.String())
	return true
}

// errNobody says that a balancer has closed a connection on which it has sent
// nothing: that is how many see whether a server is alive.
var errNobody = errors.New("closed without a byte")

// proxyHeader reads the header off nc. Connections that wait for one are counted
// apart from those that log in, since they have no source yet; there may be as
// many as MaxStartups permits at most.
func (c *conn) proxyHeader(ctx context.Context, nc net.Conn) (*proxyproto.Header, error) {
	full := c.MaxStartups.orDefault().Full
	waiting, err := c.headers.admit(netip.Prefix{}, Startups{Start: full, Rate: 100, Full: full}, 0)
	if err != nil {
		return nil, fmt.Errorf("waiting for PROXY protocol headers: %w", err)
	}
	defer waiting.release()

	timeout := proxyHeaderTimeout
	if c.LoginGraceTime > 0 {
		timeout = min(timeout, c.LoginGraceTime)
	}
	nc.SetReadDeadline(time.Now().Add(timeout))
	stop := context.AfterFunc(ctx, func() { nc.SetReadDeadline(time.Unix(1, 0)) })
	raw, err := readProxyHeader(nc)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	nc.SetReadDeadline(time.Time{})

	timedOut := net.Error(nil)
	switch {
	case errors.As(err, &timedOut) && timedOut.Timeout():
		return nil, errProxyHeaderTimeout
	case err != nil && len(raw) == 0:
		return nil, errNobody
	case err != nil:
		return nil, err
	}
	return parseProxyHeader(raw)
}

// The beginnings of the two versions' headers; the PROXY protocol, sections 2.1
// and 2.2.
const (
	proxyV1 = "PROXY "
	proxyV2 = "\r\n\r\n\x00\r\nQUIT\n"
)

// readProxyHeader reads one header, and no byte more. What it has read before an
// error comes with the error.
func readProxyHeader(r io.Reader) ([]byte, error) {
	const longestV1 = 107
	raw := make([]byte, 0, 128)
	read := func(n int) error {
		old := len(raw)
		raw = slices.Grow(raw, n)[:old+n]
		got, err := io.ReadFull(r, raw[old:])
		raw = raw[:old+got]
		return err
	}
	if err := read(len(proxyV1)); err != nil {
		return raw, fmt.Errorf("reading the PROXY protocol header: %w", err)
	}
	if string(raw) == proxyV1 {
		for raw[len(raw)-1] != '\n' {
			if len(raw) == longestV1 {
				return raw, fmt.Errorf("%w: its line is too long", errProxyHeader)
			}
			if err := read(1); err != nil {
				return raw, fmt.Errorf("reading the PROXY protocol header: %w", err)
			}
		}
		return raw, nil
	}
	if string(raw) != proxyV2[:len(raw)] {
		return raw, fmt.Errorf("%w: it began with %q", errNoProxyHeader, raw)
	}
	// The rest of the signature, version and command, family, length.
	if err := read(16 - len(raw)); err != nil {
		return raw, fmt.Errorf("reading the PROXY protocol header: %w", err)
	}
	if string(raw[:len(proxyV2)]) != proxyV2 {
		return raw, fmt.Errorf("%w: it began with %q", errNoProxyHeader, raw)
	}
	length := int(binary.BigEndian.Uint16(raw[14:]))
	if length > proxyHeaderMax {
		return raw, fmt.Errorf("%w: it is to have %d bytes", errProxyHeader, length)
	}
	if err := read(length); err != nil {
		return raw, fmt.Errorf("reading the PROXY protocol header: %w", err)
	}
	return raw, nil
}

// parseProxyHeader returns a header that is either LOCAL or has two TCP
// addresses.
func parseProxyHeader(raw []byte) (*proxyproto.Header, error) {
	h, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(raw)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errProxyHeader, err)
	}
	if h.Command.IsLocal() {
		return h, nil
	}
	for _, a := range []net.Addr{h.SourceAddr, h.DestinationAddr} {
		if !addrPort(a).IsValid() {
			return nil, fmt.Errorf("%w: it is not about a TCP connection", errProxyHeader)
		}
	}
	return h, nil
}
