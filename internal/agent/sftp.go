package agent

import "os"

// opensshSFTP is OpenSSH's sftp-server on Debian and Ubuntu.
const opensshSFTP = "/usr/lib/openssh/sftp-server"

// sftpServers are the paths of sftp-server in various distributions.
var sftpServers = []string{
	opensshSFTP,
	"/usr/libexec/openssh/sftp-server",           // Fedora, Red Hat, Amazon Linux
	"/usr/lib/ssh/sftp-server",                   // Alpine, Arch, SUSE
	"/usr/libexec/ssh/sftp-server",               // SUSE
	"/usr/lib64/misc/sftp-server",                // Gentoo
	"/usr/lib/misc/sftp-server",                  // Gentoo
	"/usr/libexec/sftp-server",                   // Slackware, Void
	"/usr/lib/sftp-server",                       // Debian, for compatibility
	"/run/current-system/sw/libexec/sftp-server", // NixOS
	"/usr/local/libexec/sftp-server",             // built from source
}

// SFTPCommand returns a command for [Server.SFTP]: OpenSSH's server if it is installed, and
// otherwise fallback.
func SFTPCommand(fallback ...string) []string { return sftpCommand(sftpServers, fallback) }

func sftpCommand(places, fallback []string) []string {
	for _, program := range places {
		if info, err := os.Stat(program); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return []string{program}
		}
	}
	return fallback
}
