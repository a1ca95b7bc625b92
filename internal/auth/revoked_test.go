package auth

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// TestKeygenKRL holds the parser against the lists and the answers of the real
// ssh-keygen: -k makes them, -Q asks them.
func TestKeygenKRL(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"ca", "ca2", "a", "b", "c"} {
		sshKeygen(t, dir, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", name)
	}
	sshKeygen(t, dir, "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", "r")
	// Certificates of all kinds of serial numbers, and without one.
	type certificate struct{ file, ca, id, serial string }
	certs := []certificate{
		{"a", "ca", "alice 1", "1"}, {"a", "ca", "alice 2", "5"}, {"b", "ca", "bob", "1000"}, {"b", "ca", "bob", "1001"}, {"b", "ca2", "bob", "1001"},
		{"c", "ca", "carol", "18446744073709551615"}, {"c", "ca", "carol 0", "0"}, {"r", "ca2", "rsa", "77"},
	}
	var files []string
	for i, c := range certs {
		sshKeygen(t, dir, "-q", "-s", c.ca, "-I", c.id, "-n", "u", "-z", c.serial, c.file+".pub")
		file := fmt.Sprintf("cert%d.pub", i)
		if err := os.Rename(filepath.Join(dir, c.file+"-cert.pub"), filepath.Join(dir, file)); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	files = append(files, "ca.pub", "ca2.pub", "a.pub", "b.pub", "c.pub", "r.pub")

	var bitmap, long strings.Builder
	for i := 0; i < 300; i += 1 + i%3 {
		fmt.Fprintf(&bitmap, "serial: %d\n", 900+i)
	}
	for i := range 500 {
		fmt.Fprintf(&long, "serial: %d-%d\n", 1000*i+1, 1000*i+5)
	}
	tests := []struct {
		name  string
		ca    string // of the serials and ids; empty for -s none, which means any
		specs string
	}{
		{"nothing", "ca", ""},
		{"serials", "ca", "serial: 1\nserial: 1001\nserial: 18446744073709551615\n"},
		{"a range", "ca", "serial: 2-1000\n"},
		{"a bitmap", "ca", bitmap.String()},
		{"many ranges", "ca", long.String()},
		{"all serials", "ca", "serial: 1-18446744073709551615\n"},
		{"ids", "ca", "id: bob\nid: carol 0\n"},
		{"ids and serials", "ca2", "id: rsa\nserial: 1001\n"},
		{"of any authority", "none", "serial: 1001\nid: alice 1\n"},
		{"keys", "", "key: " + string(mustRead(t, dir, "a.pub")) + "key: " + string(mustRead(t, dir, "r.pub"))},
		{"sha1", "", "sha1: " + string(mustRead(t, dir, "b.pub"))},
		{"sha256", "", "sha256: " + string(mustRead(t, dir, "c.pub"))},
		{"an authority", "", "key: " + string(mustRead(t, dir, "ca2.pub"))},
		{"an authority by sha256", "", "sha256: " + string(mustRead(t, dir, "ca.pub"))},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			specs, krl := filepath.Join(dir, "specs"), filepath.Join(dir, "krl")
			put(t, specs, tt.specs)
			args := []string{"-q", "-k", "-f", krl}
			switch tt.ca {
			case "":
			case "none":
				args = append(args, "-s", "none")
			default:
				args = append(args, "-s", tt.ca+".pub")
			}
			sshKeygen(t, dir, append(args, specs)...)
			holdAgainstKeygen(t, dir, krl, files)
		})
	}
	t.Run("a certificate and a key", func(t *testing.T) {
		krl := filepath.Join(dir, "krl2")
		sshKeygen(t, dir, "-q", "-k", "-f", krl, "cert1.pub", "cert6.pub", "r.pub")
		holdAgainstKeygen(t, dir, krl, files)
		sshKeygen(t, dir, "-q", "-k", "-u", "-f", krl, "-z", "9", "b.pub") // add to it
		holdAgainstKeygen(t, dir, krl, files)
	})
	t.Run("a list of keys", func(t *testing.T) {
		list := filepath.Join(dir, "list")
		put(t, list, "# lost\n\n"+string(mustRead(t, dir, "a.pub"))+string(mustRead(t, dir, "ca2.pub")))
		holdAgainstKeygen(t, dir, list, files)
	})
}

func mustRead(t testing.TB, dir, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// holdAgainstKeygen asks us and ssh-keygen -Q about each of the keys. Of a list
// of keys ssh-keygen knows nothing, and is not asked.
func holdAgainstKeygen(t *testing.T, dir, krl string, files []string) {
	t.Helper()
	data, err := os.ReadFile(krl)
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := parseRevocations("krl", data)
	if err != nil {
		t.Fatal(err)
	}
	isKRL := bytes.HasPrefix(data, []byte(krlMagic))
	var answers map[string]bool
	if isKRL {
		answers = askKeygen(t, dir, krl, files)
	}
	revoked := 0
	for _, file := range files {
		key := readKey(t, filepath.Join(dir, file))
		a := &attempt{key: key}
		a.cert, _ = key.(*ssh.Certificate)
		got := r.check(a)
		if got != nil {
			revoked++
		}
		if !isKRL {
			lost := func(key ssh.PublicKey) bool {
				return bytes.Contains(data, bytes.TrimSpace(ssh.MarshalAuthorizedKey(key)))
			}
			want := lost(plainKey(a.key)) || a.cert != nil && lost(a.cert.SignatureKey)
			if want != (got != nil) {
				t.Errorf("%s: we say %v", file, got)
			}
			continue
		}
		if answers[file] != (got != nil) {
			t.Errorf("%s: we say %v, ssh-keygen %v", file, got, answers[file])
		}
	}
	t.Logf("%d of %d are revoked", revoked, len(files))
}

// askKeygen returns which of the keys ssh-keygen -Q finds in the list.
func askKeygen(t *testing.T, dir, krl string, files []string) map[string]bool {
	t.Helper()
	cmd := exec.Command("ssh-keygen", append([]string{"-Q", "-f", krl}, files...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput() // fails if any is revoked
	answers := make(map[string]bool)
	for line := range strings.Lines(string(out)) {
		file, _, _ := strings.Cut(line, " ")
		switch {
		case strings.HasSuffix(line, ": ok\n"):
			answers[file] = false
		case strings.HasSuffix(line, ": REVOKED\n"):
			answers[file] = true
		default:
			t.Fatalf("ssh-keygen -Q: %v, %q", err, line)
		}
	}
	if len(answers) != len(files) {
		t.Fatalf("ssh-keygen -Q answers for %d of %d keys: %v, %s", len(answers), len(files), err, out)
	}
	return answers
}

// TestRevokedKeys tests changes of the file, not its format.
func TestRevokedKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		path := put(t, filepath.Join(t.TempDir(), "revoked"), "")
		k := &Keys{
			Dir:         keysDir(t, "alice", lines(authorized(edKey(1)), authorized(edKey(2)))),
			RevokedKeys: path,
			Log:         slog.New(slog.NewTextHandler(&log, nil)),
		}
		// later makes the file look as if it had been read long after its last
		// change, and lets it be looked at again.
		later := func() {
			d := k.revoked.get(path)
			d.readAt = time.Unix(0, d.state.ctime).Add(2 * settleTime)
			k.revokedBefore.Store(d)
		}
		expect := func(step string, one, two string) {
			t.Helper()
			time.Sleep(unsettledTTL + 10*time.Millisecond)
			for i, want := range []string{one, two} {
				_, err := k.Authorize("alice", edKey(byte(i+1)), home, today)
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("%s: key %d: %v, want %q", step, i+1, err, want)
				}
				if unknown := strings.HasPrefix(want, "every login"); errors.Is(err, ErrUndecided) != unknown {
					t.Errorf("%s: %v is undecided, or is not", step, err)
				}
			}
		}
		expect("empty", "", "")
		later()
		put(t, path, authorized(edKey(1)))
		expect("one", "the key is revoked", "")
		later()
		// Half of a list that is being written may look like a whole one.
		put(t, path, "")
		expect("emptied a moment ago", "the key is revoked", "")
		put(t, path, authorized(edKey(2)))
		expect("another", "the key is revoked", "the key is revoked")
		later()
		expect("another, settled", "", "the key is revoked")

		const nobody = "every login is refused, because the revoked keys cannot be read"
		put(t, path, "ssh-ed25519 AAAA\n")
		expect("garbled", nobody, nobody)
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 || !strings.Contains(log.String(), "revoked: line 1: the key is truncated or corrupt") {
			t.Errorf("logged %d times:\n%s", n, log.String())
		}
		put(t, path, authorized(edKey(1)))
		expect("mended", "the key is revoked", "the key is revoked") // still, for a moment
		os.Chmod(path, 0o666)
		expect("of everybody", nobody, nobody)
		os.Remove(path)
		expect("gone", nobody, nobody)
		if problems := k.Check(); len(problems) != 1 {
			t.Errorf("problems %v", problems)
		}
	})
}

// TestRevokedListMistakes wants everything that may be meant to revoke something
// to be an error, and nothing else.
func TestRevokedListMistakes(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"restrict " + plain, "ssh-ed25519", plain[:30], "alice", "ssh-rsa " + strings.Fields(plain)[1], "SHA256:abc",
		lines(plain, "x y"), "ssh-new " + strings.Fields(wire("ssh-new", "x"))[1],
	} {
		if _, _, err := parseRevocations("list", []byte(text)); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
	for _, text := range []string{"", "\n#\n", plain + " comment\r\n", rsaOf(1024), wire("ssh-dss", "x"), authorized(sign(t, nil))} {
		if _, _, err := parseRevocations("list", []byte(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	// A certificate in the list revokes the key in it.
	r, _, _ := parseRevocations("list", []byte(authorized(sign(t, nil))))
	if err := r.check(&attempt{key: edKey(1)}); err == nil {
		t.Error("the key of a revoked certificate is not")
	}
}

// krl builds a list of sections by hand.
func krl(sections ...[]byte) []byte {
	b := append([]byte(krlMagic), 0, 0, 0, krlFormatVersion)
	b = append(b, make([]byte, 3*8)...)
	b = append(b, make([]byte, 2*4)...)
	return append(b, bytes.Join(sections, nil)...)
}

// part is a section, or a part of one.
func part(typ byte, body ...[]byte) []byte {
	b := bytes.Join(body, nil)
	return append(binary.BigEndian.AppendUint32([]byte{typ}, uint32(len(b))), b...)
}

func str(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

var anyCA = append(str(""), str("")...)

func TestKRLMistakes(t *testing.T) {
	t.Parallel()
	certs := func(parts ...[]byte) []byte {
		return krl(part(krlCertificates, anyCA, bytes.Join(parts, nil)))
	}
	tests := []struct {
		name    string
		in      []byte
		wantErr string // empty: fine
	}{
		{"empty", krl(), ""},
		{"another format", append([]byte(krlMagic), 0, 0, 0, 2), "format 2"},
		{"no version", []byte(krlMagic), "truncated"},
		{"no header", krl()[:30], "truncated"},
		{"a byte behind", append(krl(), 1), "truncated"},
		{"a section too long", append(krl(), 1, 0xff, 0xff, 0xff, 0xff), "truncated"},
		{"an unknown section", krl(part(9)), "section 9 of the revocation list: unknown type"},
		{"a signature", krl(part(krlSignature, str("key")), str("sig")), "signatures of revocation lists are not supported"},
		{"a SHA-1 of 19 bytes", krl(part(krlFingerprintSHA1, str(strings.Repeat("x", 19)))), "wrong length"},
		{"a SHA-256 of 20 bytes", krl(part(krlFingerprintSHA256, str(strings.Repeat("x", 20)))), "wrong length"},
		{"half a fingerprint", krl(part(krlFingerprintSHA256, []byte{0, 0, 0, 32, 1})), "truncated"},
		{"a key of an unknown type", krl(part(krlExplicitKey, str("x"))), ""},
		{"an extension", krl(part(krlExtension, str("x@example.com"), []byte{0}, str("y"))), ""},
		{"an extension that must be understood", krl(part(krlExtension, str("x@example.com"), []byte{1}, str("y"))), `unknown critical extension "x@example.com"`},
		{"too much extension", krl(part(krlExtension, str("x"), []byte{0}, str("y"), []byte{0})), "trailing data"},

		{"no authority", krl(part(krlCertificates, []byte{0})), "truncated"},
		{"an unknown part", certs(part(0x30)), "part 0x30: unknown type"},
		{"a part too long", certs([]byte{krlKeyID, 0, 0, 1, 0}), "truncated"},
		{"serial 0", certs(part(krlSerialList, u64(1), u64(0))), "serial number 0"},
		{"half a serial", certs(part(krlSerialList, u64(1), []byte{1})), "truncated"},
		{"a range", certs(part(krlSerialRange, u64(3), u64(3))), ""},
		{"a range backwards", certs(part(krlSerialRange, u64(3), u64(2))), "from 3 down to 2"},
		{"half a range", certs(part(krlSerialRange, u64(3))), "truncated"},
		{"a range and more", certs(part(krlSerialRange, u64(3), u64(4), u64(5))), "trailing data"},
		{"a bitmap", certs(part(krlSerialBitmap, u64(0), str("\x02"))), ""},
		{"a bitmap of zero", certs(part(krlSerialBitmap, u64(0), str("\x01"))), "serial number 0"},
		{"a negative bitmap", certs(part(krlSerialBitmap, u64(1), str("\x80"))), "negative"},
		{"a bitmap beyond the end", certs(part(krlSerialBitmap, u64(1<<64-3), str("\x00\xff"))), "beyond the last"},
		{"an empty bitmap", certs(part(krlSerialBitmap, u64(1), str(""))), ""},
		{"key ids", certs(part(krlKeyID, str("a"), str(""))), ""},
		{"a certificate extension", certs(part(krlCertExt, str("x"), []byte{1}, str(""))), "unknown critical extension"},
	}
	for _, tt := range tests {
		_, err := parseKRL(tt.in)
		if tt.wantErr == "" && err != nil || tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.wantErr)
		}
	}
	// A list that is cut off anywhere but between sections is no list.
	whole := krl(part(krlCertificates, anyCA, part(krlSerialRange, u64(1), u64(2))), part(krlFingerprintSHA256, str(strings.Repeat("x", 32))))
	between := []int{len(krl()), len(krl(part(krlCertificates, anyCA, part(krlSerialRange, u64(1), u64(2))))), len(whole)}
	for n := len(krlMagic); n <= len(whole); n++ {
		if _, err := parseKRL(whole[:n]); (err == nil) != slices.Contains(between, n) {
			t.Errorf("cut off after %d bytes: %v", n, err)
		}
	}
}

func TestSerials(t *testing.T) {
	t.Parallel()
	r, err := parseKRL(krl(part(krlCertificates, anyCA,
		part(krlSerialRange, u64(10), u64(20)), part(krlSerialList, u64(5), u64(15), u64(21)), part(krlSerialRange, u64(18), u64(25)),
		part(krlSerialBitmap, u64(100), str("\x00\x80\x01")), part(krlSerialRange, u64(1<<63), u64(1<<64-1)))))
	if err != nil {
		t.Fatal(err)
	}
	revoked := func(n uint64) bool { return r.certs[""].hasSerial(n) }
	for _, n := range []uint64{5, 10, 15, 20, 21, 25, 100, 115, 1 << 63, 1<<64 - 1} {
		if !revoked(n) {
			t.Errorf("%d is not revoked", n)
		}
	}
	for _, n := range []uint64{0, 1, 4, 6, 9, 26, 99, 101, 114, 116, 124, 1<<63 - 1} {
		if revoked(n) {
			t.Errorf("%d is revoked", n)
		}
	}
}

// FuzzKRL adds a revocation to a list: the result must contain it, and all that the
// list revoked before.
func FuzzKRL(f *testing.F) {
	f.Add(krl()[len(krlMagic):])
	f.Add(krl(part(krlCertificates, anyCA, part(krlSerialRange, u64(1), u64(7)), part(krlKeyID, str("x"))))[len(krlMagic):])
	f.Add(krl(part(krlCertificates, anyCA, part(krlSerialBitmap, u64(1), str("\x55\xaa")), part(krlSerialList, u64(9))))[len(krlMagic):])
	f.Add(krl(part(krlExplicitKey, str(string(edKey(1).Marshal()))), part(krlFingerprintSHA1, str(strings.Repeat("1", 20))))[len(krlMagic):])
	f.Add(krl(part(krlFingerprintSHA256, str(strings.Repeat("1", 32))), part(krlExtension, str("x"), []byte{0}, str("")))[len(krlMagic):])
	cert := &ssh.Certificate{Key: edKey(1), Serial: 7, CertType: ssh.UserCert, KeyId: "x", ValidPrincipals: []string{"alice"}, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, signer(9)); err != nil {
		f.Fatal(err)
	}
	a := &attempt{key: cert, cert: cert}
	f.Fuzz(func(t *testing.T, in []byte) {
		data := append([]byte(krlMagic), in...)
		r, err := parseKRL(data)
		if err != nil {
			return
		}
		before := r.check(a)
		// The ranges are sorted and do not overlap.
		for _, c := range r.certs {
			for i, s := range c.serials {
				if s.low == 0 || s.low > s.high || i > 0 && s.low <= c.serials[i-1].high {
					t.Fatalf("ranges %v", c.serials)
				}
			}
		}
		more, err := parseKRL(append(data, part(krlCertificates, anyCA, part(krlSerialList, u64(7)))...))
		if err != nil {
			t.Fatalf("a section more, and it is none any more: %v", err)
		}
		if more.check(a) == nil {
			t.Fatal("what was added is not revoked")
		}
		other, err := parseKRL(append(data, part(krlCertificates, anyCA, part(krlSerialList, u64(8)))...))
		if err != nil || (other.check(a) == nil) != (before == nil) {
			t.Fatalf("another serial changed %v, %v", before, err)
		}
	})
}

// FuzzRevokedList wants every key of a list that is accepted to be revoked, as
// it logs in: without a certificate around it.
func FuzzRevokedList(f *testing.F) {
	for _, s := range []string{"", "# none", plain, lines(plain, "", "\t"+plain+" c\r"), rsaOf(1024), wire("ssh-dss", "x"), "ssh-ed25519 AAAA", authorized(sign(f, nil))} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseRevokedList([]byte(text))
		if err != nil {
			return
		}
		for line := range strings.SplitSeq(text, "\n") {
			key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
			if err != nil || !isKeyType(strings.Fields(line)[0]) {
				continue
			}
			a := &attempt{key: key}
			a.cert, _ = key.(*ssh.Certificate)
			if r.check(a) == nil {
				t.Fatalf("%q is not revoked by %q", line, text)
			}
		}
	})
}
