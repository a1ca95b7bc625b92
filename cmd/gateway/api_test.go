package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// certificate makes a certificate for localhost and 127.0.0.1, signed by itself.
func (env *scriptEnv) certificate(ts *testscript.TestScript, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: cert FILE")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), Subject: pkix.Name{CommonName: "gateway"},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(env.loop)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	ts.Check(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	ts.Check(err)
	ts.Check(os.WriteFile(env.path(args[0]+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	ts.Check(os.WriteFile(env.path(args[0]+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
}

var shellBlock = regexp.MustCompile("(?s)\n```sh\n(.*?\n)```\n")

// shellOf writes the shell blocks of a page of the documentation to files.
func (env *scriptEnv) shellOf(ts *testscript.TestScript, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: shell PAGE")
	}
	page, err := os.ReadFile(filepath.Join("../../docs", args[0]))
	ts.Check(err)
	for i, block := range shellBlock.FindAllSubmatch(page, -1) {
		ts.Check(os.WriteFile(env.path(fmt.Sprintf("%s.%d", args[0], i+1)), block[1], 0o600))
	}
}
