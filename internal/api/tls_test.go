package api

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// testCertificate makes a certificate for names and addresses, signed by itself.
func testCertificate(t testing.TB, names ...string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// overTLS sends a request over TLS, and returns the answer and the server's certificate.
func (ta *testAPI) overTLS(req *http.Request) (answer, []byte) {
	ta.t.Helper()
	nc, err := ta.ln.Dial()
	if err != nil {
		ta.t.Fatal(err)
	}
	client := tls.Client(nc, &tls.Config{InsecureSkipVerify: true})
	defer client.Close()
	if err := req.Write(client); err != nil {
		ta.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(client), req)
	if err != nil {
		ta.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		ta.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}, client.ConnectionState().PeerCertificates[0].Raw
}

func removeKeys(t testing.TB, ta *testAPI, user string) {
	t.Helper()
	if err := os.Remove(filepath.Join(ta.dir, "keys.d", user)); err != nil {
		t.Fatal(err)
	}
}
