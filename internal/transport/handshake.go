package transport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"runtime/debug"
	"slices"
)

// The messages that one side may send and receive in each state of a key exchange (RFC
// 4253 sections 7 to 9):
//
//	              out                                 in
//	idle          all                                 all
//	KEXINIT sent  key exchange only, others are held  all
//	KEXINIT read  key exchange only                   key exchange only
//	NEWKEYS sent  all, with the new keys              key exchange only
//	NEWKEYS read  all                                 all
//
// Either side may send KEXINIT first, and any goroutine may send it (Rekey). The
// goroutine that reads does the rest, in exchange.

// Handshake exchanges identification strings and does the first key exchange. It
// has no timeout: set a deadline on the net.Conn, or close it. If Handshake fails, a
// peer that has violated the protocol has been sent DISCONNECT; the caller closes the
// Conn in any case.
//
// If the peer's identification string was read, PeerVersion returns it even if
// Handshake fails. The error is a *[HostKeyError] if the client does not accept the
// server's host key, and may wrap [ErrVersion] or [ErrNoCommonAlgorithm].
func (c *Conn) Handshake() error {
	err := c.checkConfig()
	if err == nil {
		err = c.handshake()
	}
	if err != nil {
		c.readFailed(err)
	}
	return err
}

func (c *Conn) checkConfig() error {
	switch {
	case c.server && len(c.cfg.HostKeys) == 0:
		return errors.New("no host keys")
	case !c.server && c.cfg.HostKey == nil:
		return errors.New("no check of the host key")
	}
	return CheckAlgorithms(c.cfg)
}

func (c *Conn) handshake() error {
	if err := c.sendVersion(); err != nil {
		return err
	}
	// Send KEXINIT at once (RFC 4253 section 7.1), unless its content depends on
	// the peer's identification string.
	if c.cfg.CiphersFor == nil {
		c.Rekey()
	} else {
		c.Flush()
	}
	if err := c.readVersion(); err != nil {
		return err
	}
	if err := c.Rekey(); err != nil {
		return err
	}
	p, err := c.readKex(msgKexInit)
	if err != nil {
		return err
	}
	first := c.in.seq == 1
	return c.ownStack(func() error { return c.exchange(p, first) })
}

// Rekey starts a key exchange unless one is under way. It does not wait for it.
func (c *Conn) Rekey() error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.beginExchangeLocked()
	return c.out.err
}

// beginExchangeLocked sends KEXINIT, unless a key exchange is under way.
func (c *Conn) beginExchangeLocked() {
	w := &c.out
	if w.exchanging || w.err != nil {
		return
	}
	c.kexInit = c.proposal(c.sessionID == nil).marshal()
	w.seal(c.kexInit)
	w.exchanging, w.holding = true, true
	close(*c.exchangeBegun.Load())
	c.flushLocked()
}

// Exchanging returns a channel that is closed when the next key exchange begins, with
// the KEXINIT of either side; during a key exchange it is closed already. See
// [Conn.WaitWritableUnless].
func (c *Conn) Exchanging() <-chan struct{} { return *c.exchangeBegun.Load() }

// handle handles a packet that is not for the caller of ReadPacket.
func (c *Conn) handle(p []byte) error {
	switch p[0] {
	case msgDisconnect:
		return parseDisconnect(p)
	case msgIgnore, msgDebug, msgUnimplemented, msgPong:
		return nil
	case msgExtInfo:
		return c.receiveExtInfo(p)
	case msgPing:
		return c.pong(p)
	case msgKexInit:
		// A key exchange costs this side more CPU time than the peer, so a
		// peer that has not logged in gets one. OpenSSH starts no second one
		// before authentication.
		if !c.loggedIn.Load() {
			return &ProtocolError{ReasonProtocolError, "key exchange before authentication"}
		}
		return c.ownStack(func() error { return c.exchange(p, false) })
	}
	if p[0] >= msgFirstKex {
		return unexpected(p)
	}
	if err := c.Unimplemented(); err != nil {
		return err
	}
	return c.Flush()
}

func unexpected(p []byte) error {
	return &ProtocolError{ReasonProtocolError, fmt.Sprintf("unexpected message %d", p[0])}
}

// Unimplemented answers the packet that ReadPacket returned last with
// UNIMPLEMENTED (RFC 4253 section 11.4). It does not flush.
func (c *Conn) Unimplemented() error {
	b := []byte{msgUnimplemented}
	return c.WritePacket(binary.BigEndian.AppendUint32(b, c.in.last))
}

// pong answers PING (OpenSSH's PROTOCOL, section 1.8).
func (c *Conn) pong(ping []byte) error {
	data, rest, ok := cutString(ping[1:])
	if !ok || len(rest) > 0 {
		return &ProtocolError{ReasonProtocolError, "malformed PING"}
	}
	if err := c.WritePacket(appendString([]byte{msgPong}, data)); err != nil {
		return err
	}
	return c.Flush()
}

const maxDisconnectText = 1 << 10

func marshalDisconnect(reason uint32, text string) []byte {
	b := binary.BigEndian.AppendUint32([]byte{msgDisconnect}, reason)
	b = appendString(b, text[:min(len(text), maxDisconnectText)])
	return appendString(b, "") // language
}

// parseDisconnect returns a DisconnectError, also if the message is malformed.
func parseDisconnect(p []byte) error {
	e := &DisconnectError{}
	if len(p) >= 5 {
		e.Reason = binary.BigEndian.Uint32(p[1:])
		if text, _, ok := cutString(p[5:]); ok {
			e.Message = string(text[:min(len(text), maxDisconnectText)])
		}
	}
	return e
}

// readKex returns the next packet of a key exchange, whose message number must be want.
// IGNORE, DEBUG and UNIMPLEMENTED may come between (RFC 4253 section 7.1), except in the
// first key exchange if it is strict. Whether it is strict is known after KEXINIT only;
// exchange checks that no packet came before KEXINIT then.
func (c *Conn) readKex(want byte) ([]byte, error) {
	for {
		p, err := c.nextPacket()
		switch {
		case err != nil:
			return nil, err
		case p[0] == want:
			return p, nil
		case p[0] == msgDisconnect:
			return nil, parseDisconnect(p)
		case c.strict && c.sessionID == nil:
			return nil, unexpected(p)
		case p[0] != msgIgnore && p[0] != msgDebug && p[0] != msgUnimplemented:
			return nil, unexpected(p)
		}
	}
}

// exchange does a key exchange, from the peer's KEXINIT on. First says whether this is
// the peer's first packet.
func (c *Conn) exchange(peerInit []byte, first bool) error {
	peerInit = slices.Clone(peerInit) // hashed below, after other packets were read
	if err := c.Rekey(); err != nil {
		return err
	}
	initial := c.sessionID == nil
	peer, err := parseKexInit(peerInit)
	if err != nil {
		return err
	}
	own, err := parseKexInit(c.kexInit)
	if err != nil {
		return err
	}
	client, server := own, peer
	clientInit, serverInit := c.kexInit, peerInit
	clientVersion, serverVersion := c.Version(), c.peerVersion
	if c.server {
		client, server = server, client
		clientInit, serverInit = serverInit, clientInit
		clientVersion, serverVersion = serverVersion, clientVersion
	}
	// Markers count in the first key exchange only.
	if initial && slices.Contains(client.kex, kexStrictClient) && slices.Contains(server.kex, kexStrictServer) {
		c.strict = true
		if !first {
			return &ProtocolError{ReasonProtocolError, "strict key exchange: KEXINIT was not the first packet"}
		}
	}
	algorithms, wrongGuess, err := negotiate(client, server, c.server)
	if err != nil {
		c.sendDisconnect(ReasonKeyExchangeFailed, err.Error())
		return err
	}
	if wrongGuess {
		if err := c.skipGuess(); err != nil {
			return err
		}
	}

	method := kexMethods[algorithms.Kex]
	h := method.hash()
	for _, s := range [][]byte{[]byte(clientVersion), []byte(serverVersion), clientInit, serverInit} {
		h.Write(appendString(nil, s))
	}
	var secret, sum []byte
	if c.server {
		secret, sum, err = c.answer(method, algorithms.HostKey, h)
	} else {
		secret, sum, err = c.offer(method, algorithms.HostKey, h)
	}
	if err != nil {
		return err
	}
	if initial {
		c.sessionID = sum
	}
	keys := keySource{method.hash, secret, sum, c.sessionID}
	toClient, toServer := algorithms.CipherOut, algorithms.CipherIn
	macToClient, macToServer := algorithms.MACOut, algorithms.MACIn
	if !c.server {
		toClient, toServer = toServer, toClient
		macToClient, macToServer = macToServer, macToClient
	}
	out, in := keys.protection("BDF", toClient, macToClient), keys.protection("ACE", toServer, macToServer)
	if !c.server {
		out, in = in, out
	}
	sendExtInfo := initial && c.server && slices.Contains(client.kex, extInfoClient)
	if err := c.sendNewKeys(out, sendExtInfo); err != nil {
		return err
	}
	if err := c.readNewKeys(in); err != nil {
		return err
	}
	c.algorithms.Store(&algorithms)
	return nil
}

// skipGuess drops the packet of a wrong guess (RFC 4253 section 7), which may be any
// message of a key exchange method.
func (c *Conn) skipGuess() error {
	p, err := c.nextPacket()
	switch {
	case err != nil:
		return err
	case p[0] == msgDisconnect:
		return parseDisconnect(p)
	case p[0] < msgKexOffer || p[0] >= msgFirstOther:
		return unexpected(p)
	}
	return nil
}

// offer is the client's part (RFC 5656 section 4).
func (c *Conn) offer(method *kexMethod, hostKey string, h hash.Hash) (secret, sum []byte, err error) {
	init, finish, err := method.client()
	if err != nil {
		return nil, nil, err
	}
	if err := c.sendKex(appendString([]byte{msgKexOffer}, init)); err != nil {
		return nil, nil, err
	}
	p, err := c.readKex(msgKexReply)
	if err != nil {
		return nil, nil, err
	}
	key, rest, ok1 := cutString(p[1:])
	reply, rest, ok2 := cutString(rest)
	signature, rest, ok3 := cutString(rest)
	if !ok1 || !ok2 || !ok3 || len(rest) > 0 {
		return nil, nil, &ProtocolError{ReasonKeyExchangeFailed, "malformed key exchange reply"}
	}
	secret, err = finish(reply)
	if err != nil {
		return nil, nil, kexFailed(err)
	}
	sum = exchangeHash(h, key, init, reply, secret)
	err = c.checkHostKey(hostKey, key, signature, sum)
	var untrusted *HostKeyError
	if errors.As(err, &untrusted) {
		c.sendDisconnect(ReasonHostKeyNotVerifiable, "host key not accepted")
	}
	return secret, sum, err
}

// answer is the server's part.
func (c *Conn) answer(method *kexMethod, hostKey string, h hash.Hash) (secret, sum []byte, err error) {
	p, err := c.readKex(msgKexOffer)
	if err != nil {
		return nil, nil, err
	}
	init, rest, ok := cutString(p[1:])
	if !ok || len(rest) > 0 {
		return nil, nil, &ProtocolError{ReasonKeyExchangeFailed, "malformed key exchange offer"}
	}
	reply, secret, err := method.server(init)
	if err != nil {
		return nil, nil, kexFailed(err)
	}
	signer := hostKeySigner(c.cfg, hostKey)
	key := signer.PublicKey()
	blob := key.Marshal()
	sum = exchangeHash(h, blob, init, reply, secret)
	signature, err := signExchange(signer, hostKey, sum)
	if err != nil {
		return nil, nil, err
	}
	if c.hostKey == nil {
		c.hostKey = key
	}
	b := appendString([]byte{msgKexReply}, blob)
	b = appendString(b, reply)
	return secret, sum, c.sendKex(appendString(b, signature))
}

func kexFailed(err error) error {
	return &ProtocolError{ReasonKeyExchangeFailed, err.Error()}
}

// exchangeHash finishes the exchange hash (RFC 4253 section 8). H has hashed the
// versions and KEXINITs.
func exchangeHash(h hash.Hash, hostKey, init, reply, secret []byte) []byte {
	h.Write(appendString(nil, hostKey))
	h.Write(appendString(nil, init))
	h.Write(appendString(nil, reply))
	h.Write(secret)
	return h.Sum(nil)
}

// sendKex seals a message of the key exchange, which is not held back. An offer is sent
// at once; a reply is sent together with NEWKEYS.
func (c *Conn) sendKex(p []byte) error {
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.seal(p)
		if p[0] == msgKexOffer {
			c.flushLocked()
		}
	}
	return w.err
}

// sendNewKeys sends NEWKEYS, then uses the new keys, and sends the packets that were
// held back.
func (c *Conn) sendNewKeys(out protection, extInfo bool) error {
	w := &c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	w.seal([]byte{msgNewKeys})
	w.protection, w.usage = out, usage{}
	if w.rekeyTimer != nil {
		w.rekeyTimer.Reset(c.cfg.RekeyInterval)
	}
	if c.strict {
		w.seq = 0
	}
	if extInfo {
		w.seal(c.marshalExtInfo()) // RFC 8308 section 2.4: the next packet
	}
	for _, p := range w.held {
		w.seal(p)
	}
	w.holding, w.held, w.heldBytes = false, nil, 0
	c.flushLocked()
	return w.err
}

// readNewKeys reads NEWKEYS, and then uses the new keys. The key exchange is over.
func (c *Conn) readNewKeys(in protection) error {
	p, err := c.readKex(msgNewKeys)
	if err != nil {
		return err
	}
	if len(p) != 1 {
		return &ProtocolError{ReasonProtocolError, "malformed NEWKEYS"}
	}
	c.in.protection, c.in.usage = in, usage{}
	if c.strict {
		c.in.seq = 0
	}
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.exchanging = false
	next := make(chan struct{})
	c.exchangeBegun.Store(&next)
	c.kexInit = nil
	return nil
}

// A keySource derives keys (RFC 4253 section 7.2).
type keySource struct {
	hash                   func() hash.Hash
	secret, sum, sessionID []byte
}

func (s *keySource) derive(letter byte, size int) []byte {
	h := s.hash()
	h.Write(s.secret)
	h.Write(s.sum)
	h.Write([]byte{letter})
	h.Write(s.sessionID)
	key := h.Sum(nil)
	for len(key) < size {
		h.Reset()
		h.Write(s.secret)
		h.Write(s.sum)
		h.Write(key)
		key = h.Sum(key)
	}
	return key[:size]
}

// protection returns the protection of one direction. Letters has the letters of its
// IV, its encryption key and its integrity key.
func (s *keySource) protection(letters, cipherName, macName string) protection {
	algorithm := ciphers[cipherName]
	iv, key := s.derive(letters[0], algorithm.iv), s.derive(letters[1], algorithm.key)
	if algorithm.aead {
		return newGCM(key, iv)
	}
	mac := macs[macName]
	return newCTR(key, iv, s.derive(letters[2], mac.key), mac)
}

// ownStack calls f in a goroutine of its own and waits for it. F, above all ML-KEM, needs
// a large stack, which the reading goroutine would keep for the life of the connection.
func (c *Conn) ownStack(f func() error) error {
	done := make(chan error)
	go func() { done <- guard(f) }()
	return <-done
}

// guard calls f and turns a panic into an error, so that it ends one connection and not
// the process.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}
