//! The reference of all settings: their names, defaults and units.

/// One setting, as the reference shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Its name in the file, with a dot between section and name.
    pub name: &'static str,
    /// Its default as one would write it; empty if there is none.
    pub default: &'static str,
    /// What it is, with its unit.
    pub meaning: &'static str,
}

const fn setting(name: &'static str, default: &'static str, meaning: &'static str) -> Setting {
    Setting { name, default, meaning }
}

/// All settings of `istiod run`.
pub const SETTINGS: &[Setting] = &[
    setting("dataDir", "", "folder of the log, the state and this member's keys; required"),
    setting(
        "memberId",
        "1",
        "the founder's number, from 1; who joins is given one, and none is used again for another disk",
    ),
    setting("name", "", "what people call this member; peers.advertise when not given"),
    setting("trustDomain", "cluster.local", "trust domain of every identity"),
    setting("xds.address", "0.0.0.0:15012", "where xDS and certificates are served"),
    setting(
        "xds.advertise",
        "",
        "how agents reach that, HOST:PORT; required when the address is 0.0.0.0 or [::]",
    ),
    setting("peers.address", "0.0.0.0:15019", "where other members reach this one"),
    setting(
        "peers.advertise",
        "",
        "how they reach that, HOST:PORT; without it this member stands alone and the port is not opened",
    ),
    setting("admin.address", "127.0.0.1:15080", "where the operator API is served"),
    setting("admin.tls", "true", "the operator API is served over TLS; false only on loopback"),
    setting("admin.names", "", "names and addresses by which operators call it, a list; for its certificate"),
    setting("admin.callsPerSecond", "1000", "calls of one operator in a second, on average"),
    setting("admin.callBurst", "2000", "calls of one operator at once after a pause"),
    setting("admin.guessesPerSecond", "5", "wrong credentials from one address in a second, on average"),
    setting("admin.guessBurst", "50", "wrong credentials from one address at once after a pause"),
    setting("metrics.address", "0.0.0.0:15014", "where /metrics is served"),
    setting("ca.directory", "", "folder with ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem"),
    setting("ca.leafLifetime", "24h", "how long a certificate is valid if its owner asks for nothing"),
    setting("ca.maxLeafLifetime", "90d", "the longest that a certificate is valid"),
    setting(
        "ca.dormancy",
        "7d",
        "how long after its certificate has ended a machine may come back with its key; 0s: not at all, at most 30d",
    ),
    setting("push.debounceQuiet", "10ms", "in a storm a push waits until nothing changed for so long"),
    setting("push.debounceLongest", "1s", "no change waits longer than this"),
    setting("push.workers", "0", "translations at the same time; 0: one per core"),
    setting("raft.electionTimeout", "800ms", "a follower that hears nothing for this long asks for votes"),
    setting("raft.heartbeat", "200ms", "a leader makes itself heard this often"),
    setting("raft.snapshotEntries", "50000", "a snapshot is taken after so many entries"),
    setting("raft.snapshotBytes", "67108864", "a snapshot is taken after so many bytes of entries"),
    setting("raft.answerWithin", "5s", "a request without an answer in this time is told so"),
    setting("raft.slowSync", "1s", "a disk is slow whose every sync takes at least this long"),
    setting("raft.slowSyncFor", "10s", "a leader whose disk was slow for so long hands leadership over"),
    setting(
        "raft.leastFreeBytes",
        "67108864",
        "with less free on its disk a leader takes no writes, and a follower none of them",
    ),
    setting("workloads.lease", "30s", "a workload whose agent is silent for this long is sent no traffic"),
    setting("workloads.removeAfter", "10m", "after this time more a silent workload is removed"),
    setting(
        "workloads.massLossShare",
        "20",
        "when more than so many percent of the agents of a group, or of the mesh, are lost at the same time, their workloads are held as unknown; 100: never",
    ),
    setting(
        "workloads.massLossWindow",
        "60s",
        "agents lost within this time, or within workloads.lease if that is longer, are lost at the same time",
    ),
    setting("workloads.massLossLeast", "3", "fewer lost agents are never held"),
    setting(
        "workloads.massLossHold",
        "24h",
        "what is held for so long is given up, and is silent from then on",
    ),
    setting("sources.files", "", "folders with files of Istio's objects that are watched, a list"),
    setting(
        "sources.consul.addresses",
        "",
        "servers of a Consul cluster, as http://HOST:8500 or https://HOST:8501, a list",
    ),
    setting(
        "sources.consul.datacenters",
        "",
        "its datacenters, the nearest first, a list; dc1 if there is none",
    ),
    setting("sources.consul.cluster", "", "name of the cluster; consul if there is none"),
    setting("sources.consul.namespace", "", "namespace of its services; consul if there is none"),
    setting("sources.consul.domain", "", "DNS domain of its services; consul if there is none"),
    setting("sources.consul.tokenFile", "", "file with the ACL token; read again when it changes"),
    setting("sources.consul.caFile", "", "PEM of the authorities of the servers' certificates; for https"),
    setting("sources.consul.certFile", "", "PEM of our certificate, when the servers want one"),
    setting("sources.consul.keyFile", "", "PEM of its key"),
    setting(
        "sources.consul.serverName",
        "",
        "the name in the servers' certificates, such as server.dc1.consul",
    ),
    setting(
        "sources.consul.maxWatches",
        "",
        "questions that wait at the same time, each for a service; 48, or 12000 over https",
    ),
    setting(
        "sources.consul.wait",
        "",
        "how long a question waits for a change, at most 10m; 60s if there is none",
    ),
    setting(
        "sources.consul.export.owner",
        "",
        "services of the mesh are written into Consul, as this mesh's, on the node mesh-OWNER; a name that no other mesh has",
    ),
    setting(
        "sources.consul.export.datacenters",
        "",
        "datacenters that are written into, a list; the first of sources.consul.datacenters if there is none",
    ),
    setting("sources.consul.export.prefix", "", "before the names of the services in Consul"),
    setting("sources.consul.export.tags", "", "tags of every entry in Consul, a list"),
    setting("sources.consul.export.rate", "", "entries written in a second, at most; 50 if there is none"),
    setting(
        "sources.consul.export.tokenFile",
        "",
        "file with the ACL token for writing; sources.consul.tokenFile if there is none",
    ),
    setting("log.level", "info", "a level, or levels by module such as info,xds=debug"),
    setting("log.format", "text", "text or json"),
];
