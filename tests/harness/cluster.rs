//! A control plane of several members, each a process with a loopback address of its own, or on a machine of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::admin::Door;
use crate::http::Answer;
use crate::istiod::sum;
use crate::netns::Machine;
use crate::program::{self, Program};
use crate::workload::{free_block, own_address};
use crate::{PATIENCE, eventually, text};

/// The members; the first founded the cluster.
#[derive(Debug)]
pub struct Cluster {
    /// In the order in which they joined.
    pub members: Vec<Member>,
}

/// One member.
#[derive(Debug)]
pub struct Member {
    /// Its name, and that of its log.
    pub name: String,
    site: Site,
    folder: PathBuf,
    program: Program,
}

/// Where a member is.
#[derive(Debug, Clone)]
struct Site {
    /// Where peers and proxies reach it.
    own: Ipv4Addr,
    machine: Option<Machine>,
    /// YAML of further settings.
    settings: String,
}

impl Site {
    fn loopback(settings: &str) -> anyhow::Result<Self> {
        Ok(Self { own: own_address(free_block()?), machine: None, settings: settings.to_owned() })
    }

    fn of(machine: &Machine) -> Self {
        Self { own: machine.v4, machine: Some(machine.clone()), settings: String::new() }
    }

    /// Where operators reach it: on its machine only, because the admin API is plain.
    fn admin(&self, port: u16) -> SocketAddr {
        let address = if self.machine.is_some() { Ipv4Addr::LOCALHOST } else { self.own };
        SocketAddr::from((address, port))
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        match &self.machine {
            Some(machine) => machine.inside(work),
            None => work(),
        }
    }
}

impl Cluster {
    /// Founds a control plane and has others join, until there are so many voters.
    ///
    /// # Errors
    ///
    /// When a member does not start, or does not become a voter.
    pub async fn start(folder: &Path, members: usize) -> anyhow::Result<Self> {
        Self::start_with(folder, members, "").await
    }

    /// As [`Cluster::start`], with these settings of every member besides, as YAML.
    ///
    /// # Errors
    ///
    /// When a member does not start, or does not become a voter.
    pub async fn start_with(folder: &Path, members: usize, settings: &str) -> anyhow::Result<Self> {
        let sites: anyhow::Result<Vec<Site>> = (0..members).map(|_| Site::loopback(settings)).collect();
        Self::start_at(folder, sites?).await
    }

    /// As [`Cluster::start`], with a member on each of these machines.
    ///
    /// # Errors
    ///
    /// When a member does not start, or does not become a voter.
    pub async fn start_on(folder: &Path, machines: &[Machine]) -> anyhow::Result<Self> {
        Self::start_at(folder, machines.iter().map(Site::of).collect()).await
    }

    async fn start_at(folder: &Path, sites: Vec<Site>) -> anyhow::Result<Self> {
        let mut cluster = Self { members: Vec::new() };
        for (number, site) in (1..).zip(sites) {
            let name = format!("istiod-{number}");
            let member = match cluster.members.first() {
                None => Member::found(folder, &name, site)?,
                Some(first) => {
                    let command = first.istioctl(&["members", "add"])?;
                    let ticket = command.split_whitespace().last().context("no ticket")?;
                    Member::launch(folder, &name, site, &["--join", ticket])?
                }
            };
            member.ready().await?;
            cluster.members.push(member);
        }
        cluster.voting(cluster.members.len()).await?;
        Ok(cluster)
    }

    /// The place of the member that leads, as `asked` knows it.
    ///
    /// # Errors
    ///
    /// When it does not answer, or knows none.
    pub async fn leader(&self, asked: usize) -> anyhow::Result<usize> {
        let answer = self.member(asked)?.door()?.call("GET", "/api/v1/members", None).await?;
        let page: Value = answer.json()?;
        let rows = page.get("items").and_then(Value::as_array).context("no list")?;
        let leader = rows.iter().find(|row| text(row, "/part") == "leader").context("no leader")?;
        let place = self.members.iter().position(|member| member.name == text(leader, "/name"));
        place.with_context(|| format!("{leader} is no member"))
    }

    /// The ways to the members' admin APIs.
    ///
    /// # Errors
    ///
    /// When a member has no operator.
    pub fn doors(&self) -> anyhow::Result<Vec<Door>> {
        self.members.iter().map(Member::door).collect()
    }

    /// A member by its place.
    ///
    /// # Errors
    ///
    /// When there are fewer.
    pub fn member(&self, place: usize) -> anyhow::Result<&Member> {
        self.members.get(place).context("fewer members")
    }

    /// A member by its place, to end or to restart it.
    ///
    /// # Errors
    ///
    /// When there are fewer.
    pub fn member_mut(&mut self, place: usize) -> anyhow::Result<&mut Member> {
        self.members.get_mut(place).context("fewer members")
    }

    /// Waits until so many members vote and all are heard.
    ///
    /// # Errors
    ///
    /// When they do not.
    pub async fn voting(&self, voters: usize) -> anyhow::Result<()> {
        eventually(PATIENCE * 2, "all members vote", || async {
            let rows: Value =
                serde_json::from_str(&self.member(0)?.istioctl(&["members", "list", "-o", "json"])?)?;
            let rows = rows.as_array().context("no list")?;
            let votes = |row: &&Value| ["voter", "leader"].contains(&text(row, "/part"));
            let silent = rows.iter().any(|row| row.get("heard") == Some(&Value::Bool(false)));
            ensure!(rows.iter().filter(votes).count() == voters && !silent, "{rows:?}");
            Ok(())
        })
        .await
        .with_context(|| self.last_words())
    }

    /// The streams of each member that runs.
    ///
    /// # Errors
    ///
    /// When one does not tell.
    pub async fn streams(&self) -> anyhow::Result<Vec<f64>> {
        self.sums("pilot_xds").await
    }

    /// The sum of a metric's samples on each member that runs.
    ///
    /// # Errors
    ///
    /// When one does not tell.
    pub async fn sums(&self, metric: &str) -> anyhow::Result<Vec<f64>> {
        let mut sums = Vec::new();
        for member in self.members.iter().filter(|member| member.program.is_running()) {
            sums.push(member.metric(metric).await?);
        }
        Ok(sums)
    }

    /// Waits until the members that run hold so many streams together, and none more than 1.1 times the mean, and
    /// one. Gives what each holds.
    ///
    /// # Errors
    ///
    /// When they do not.
    pub async fn spread(&self, streams: u32) -> anyhow::Result<Vec<f64>> {
        eventually(PATIENCE * 2, "streams are spread", || async {
            let held = self.streams().await?;
            let members = u32::try_from(held.len())?;
            let bound = f64::from(streams) / f64::from(members) * 1.1 + 1.0;
            let total: f64 = held.iter().sum();
            ensure!(total >= f64::from(streams) && total <= f64::from(streams), "{held:?} of {streams}");
            ensure!(held.iter().all(|held| *held <= bound), "{held:?}, the bound is {bound}");
            Ok(held)
        })
        .await
    }

    fn last_words(&self) -> String {
        self.members.iter().map(Member::last_words).collect::<Vec<_>>().join("\n--\n")
    }
}

impl Member {
    fn found(folder: &Path, name: &str, site: Site) -> anyhow::Result<Self> {
        let own = site.own;
        let data = folder.join(name);
        let settings = folder.join(format!("{name}.init.yaml"));
        let args =
            ["init", "--config", &settings.display().to_string(), "--data-dir", &data.display().to_string()];
        let (peer, xds) = (format!("{own}:15019"), format!("{own}:15012"));
        let args = [&args[..], &["--peer", &peer, "--xds", &xds]].concat();
        let (code, out, err) = program::run("istiod", &[], &args)?;
        ensure!(code == 0, "{code}: {out}{err}");
        Self::launch(folder, name, site, &[])
    }

    fn launch(folder: &Path, name: &str, site: Site, flags: &[&str]) -> anyhow::Result<Self> {
        let settings = folder.join(format!("{name}.yaml"));
        let (own, admin, metrics) = (site.own, site.admin(15080), site.admin(15014));
        let yaml = format!(
            "dataDir: {}\nname: {name}\npeers: {{address: '{own}:15019', advertise: '{own}:15019'}}\n\
             xds: {{address: '{own}:15012', advertise: '{own}:15012'}}\nadmin: {{address: '{admin}', tls: false}}\n\
             metrics: {{address: '{metrics}'}}\n{}",
            folder.join(name).display(),
            site.settings
        );
        std::fs::write(&settings, yaml)?;
        let mut args = ["run", "--config", &settings.display().to_string()].map(str::to_owned).to_vec();
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let binary = program::ours("istiod")?;
        let program = site.inside(|| Program::start(&binary, folder, name, &args))?;
        Ok(Self { name: name.to_owned(), site, folder: folder.to_owned(), program })
    }

    /// Waits until it serves.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ready(&self) -> anyhow::Result<()> {
        eventually(PATIENCE, "a member is ready", || async {
            let ready = self.get(15080, "/ready").await?;
            ensure!(ready.status == 200, "{ready:?}");
            Ok(())
        })
        .await
        .with_context(|| self.last_words())
    }

    fn last_words(&self) -> String {
        let log = self.program.output();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
    }

    async fn get(&self, port: u16, path: &str) -> anyhow::Result<Answer> {
        let (address, machine) = (self.site.admin(port), self.site.machine.clone());
        let open = Door { member: self.name.clone(), address, machine, token: String::new() };
        open.call("GET", path, None).await
    }

    /// The way to its admin API, for an administrator.
    ///
    /// # Errors
    ///
    /// When there is no token yet.
    pub fn door(&self) -> anyhow::Result<Door> {
        let token = std::fs::read_to_string(self.token())?.trim().to_owned();
        let (address, machine) = (self.site.admin(15080), self.site.machine.clone());
        Ok(Door { member: self.name.clone(), address, machine, token })
    }

    fn token(&self) -> PathBuf {
        self.folder.join(&self.name).join("operator/admin-token")
    }

    /// Where proxies reach it.
    #[must_use]
    pub fn xds(&self) -> SocketAddr {
        SocketAddr::from((self.site.own, 15012))
    }

    /// Its machine, if it has one of its own.
    ///
    /// # Errors
    ///
    /// When it has none.
    pub fn machine(&self) -> anyhow::Result<&Machine> {
        self.site.machine.as_ref().context("the member is on this machine")
    }

    /// `kill -9`.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.program.kill()
    }

    /// Stops it where it stands, or lets it go on.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn freeze(&self, frozen: bool) -> anyhow::Result<()> {
        self.program.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let status = self.program.stop().await?;
        ensure!(status.success(), "{status}: {}", self.program.output());
        Ok(())
    }

    /// Starts it again, as it is started after it has joined: without a ticket.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.launch_again()?;
        self.ready().await
    }

    /// As [`Member::restart`], without waiting: it may need others that are not there yet.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn launch_again(&mut self) -> anyhow::Result<()> {
        *self = Self::launch(&self.folder, &self.name, self.site.clone(), &[])?;
        Ok(())
    }

    /// What it wrote to its log.
    #[must_use]
    pub fn log(&self) -> String {
        self.program.output()
    }

    /// Runs `istioctl` against this member, which must succeed; its standard output.
    ///
    /// # Errors
    ///
    /// When it does not, with what it said.
    pub fn istioctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let url = format!("http://{}", self.site.admin(15080));
        let token = self.token().display().to_string();
        let envs = [("ISTIOCTL_SERVER", url.as_str()), ("ISTIOCTL_TOKEN_FILE", token.as_str())];
        // Whatever else goes on goes on.
        let (code, out, err) =
            tokio::task::block_in_place(|| self.site.inside(|| program::run("istioctl", &envs, args)))?;
        ensure!(code == 0, "istioctl {args:?} at {}: {code}: {err}{out}", self.name);
        Ok(out)
    }

    /// Commits YAML by this member, and waits until every proxy runs it, whichever member serves it.
    ///
    /// # Errors
    ///
    /// What was refused, or which proxies do not run it.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let file = self.folder.join(format!("{}.objects.yaml", self.name));
        std::fs::write(&file, yaml)?;
        self.istioctl(&["apply", "-f", &file.display().to_string(), "--wait"]).map(drop)
    }

    /// Sum of the samples of one of its metrics.
    ///
    /// # Errors
    ///
    /// When it does not tell its metrics.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let answer = self.get(15014, "/metrics").await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        Ok(sum(&answer.text(), name, ""))
    }
}
