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

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/transport"
)

const (
	// proxyHeaderTimeout bounds the wait for a header, if LoginGraceTime is not
	// shorter. A load balancer sends the header first.
	proxyHeaderTimeout = 10 * time.Second
	// proxyHeaderMax bounds the variable part of a version 2 header, in bytes:
	// addresses and type-length-value fields.
	proxyHeaderMax = 4096
)

var (
	errNoProxyHeader      = errors.New("no PROXY protocol header, although the address is in proxy_protocol_from")
	errProxyHeader        = errors.New("invalid PROXY protocol header")
	errProxyHeaderTimeout = errors.New("timeout while waiting for the PROXY protocol header")
)

// resolveClient sets the addresses of the connection. If nc comes from a load
// balancer, they are in the PROXY header with which nc must begin. From other
// addresses nothing is read, so a header there is invalid SSH. If resolveClient
// returns false, it has closed nc.
//
// It reads no byte beyond the header, so that nc stays a plain socket, which package
// transport reads and writes without a buffer for each connection.
func (c *conn) resolveClient(ctx context.Context, nc net.Conn) bool {
	balancer := c.clientAddr.Addr()
	if !slices.ContainsFunc(c.cfg.ProxyProtocolFrom, func(p netip.Prefix) bool { return p.Contains(balancer) }) {
		return true
	}
	header, err := c.proxyHeader(ctx, nc)
	switch {
	case errors.Is(err, errSilent), ctx.Err() != nil:
		nc.Close()
		return false
	case err != nil:
		c.logRejected(rejectedProxyHeader, slog.LevelWarn, err)
		c.reject(nc, transport.ReasonHostNotAllowed, proxyMessage)
		return false
	case header.Command.IsLocal():
		// Not relayed for a client: usually a health check.
		c.healthCheck = true
		return true
	}
	c.clientAddr, c.serverAddr = identity.AddrPort(header.SourceAddr), identity.AddrPort(header.DestinationAddr)
	c.setLog("remote", c.clientAddr.String(), "balancer", balancer.String())
	return true
}

// proxyHeader reads the header from nc. Connections that wait for a header have no
// source yet, so they are counted apart from MaxStartups, with its Full as the limit.
// The error is errSilent if nothing was sent, as many health checks do.
func (c *conn) proxyHeader(ctx context.Context, nc net.Conn) (*proxyproto.Header, error) {
	full := c.cfg.MaxStartups.orDefault().Full
	slot, err := c.srv.proxyHeaders.take(netip.Prefix{}, Startups{Start: full, Rate: 100, Full: full}, 0)
	if err != nil {
		return nil, fmt.Errorf("waiting for PROXY protocol headers: %w", err)
	}
	defer slot.release()

	timeout := proxyHeaderTimeout
	if c.cfg.LoginGraceTime > 0 {
		timeout = min(timeout, c.cfg.LoginGraceTime)
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
		return nil, errSilent
	case err != nil:
		return nil, err
	}
	return parseProxyHeader(raw)
}

// The signatures of the two versions (PROXY protocol, sections 2.1 and 2.2).
const (
	proxyV1 = "PROXY "
	proxyV2 = "\r\n\r\n\x00\r\nQUIT\n"
)

// readProxyHeader reads one header and no byte more. With an error, it returns the
// bytes before the error.
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
	// The rest of the signature, then version and command, family, length.
	if err := read(16 - len(raw)); err != nil {
		return raw, fmt.Errorf("reading the PROXY protocol header: %w", err)
	}
	if string(raw[:len(proxyV2)]) != proxyV2 {
		return raw, fmt.Errorf("%w: it began with %q", errNoProxyHeader, raw)
	}
	length := int(binary.BigEndian.Uint16(raw[14:]))
	if length > proxyHeaderMax {
		return raw, fmt.Errorf("%w: its length is %d bytes", errProxyHeader, length)
	}
	if err := read(length); err != nil {
		return raw, fmt.Errorf("reading the PROXY protocol header: %w", err)
	}
	return raw, nil
}

// parseProxyHeader parses a header, which must be LOCAL or have two TCP addresses.
func parseProxyHeader(raw []byte) (*proxyproto.Header, error) {
	h, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(raw)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errProxyHeader, err)
	}
	if h.Command.IsLocal() {
		return h, nil
	}
	for _, a := range []net.Addr{h.SourceAddr, h.DestinationAddr} {
		if !identity.AddrPort(a).IsValid() {
			return nil, fmt.Errorf("%w: it does not describe a TCP connection", errProxyHeader)
		}
	}
	return h, nil
}
