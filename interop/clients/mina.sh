# Apache MINA sshd's client: keys of each type, a command and a forward with much data in both directions, with the
# client's re-keying at each MiB, and each key exchange, host key, cipher and MAC that both have.
. "$CLIENTS/lib.sh"
cp "$CLIENTS/../others/mina/"* .
mvn -q -B -Dmaven.repo.local="$MAVEN_REPOSITORY" org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies -DoutputDirectory=lib
javac -cp 'lib/*' -d classes Mina.java
gateway_of_all_algorithms
suites mlkem768x25519-sha256 "${classic_kex[@]}" >suites
java -Xmx1g -Dorg.slf4j.simpleLogger.defaultLogLevel=error -cp 'lib/*:classes' Mina "$port" alice ed25519 ecdsa rsa <suites
