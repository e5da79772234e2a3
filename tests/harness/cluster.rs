//! A control plane of several members, each a process with a loopback address of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::istiod::sum;
use crate::program::{self, Program};
use crate::workload::{free_block, own_address};
use crate::{PATIENCE, eventually, http, text};

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
    own: Ipv4Addr,
    folder: PathBuf,
    program: Program,
}

impl Cluster {
    /// Founds a control plane and has others join, until there are so many voters.
    ///
    /// # Errors
    ///
    /// When a member does not start, or does not become a voter.
    pub async fn start(folder: &Path, members: usize) -> anyhow::Result<Self> {
        let first = Member::found(folder)?;
        first.ready().await?;
        let mut cluster = Self { members: vec![first] };
        for number in 2..=members {
            let first = cluster.member(0)?;
            let command = first.istioctl(&["members", "add"])?;
            let ticket = command.split_whitespace().last().context("no ticket")?.to_owned();
            let member = Member::join(folder, &format!("istiod-{number}"), &ticket)?;
            member.ready().await?;
            cluster.members.push(member);
        }
        cluster.voting(members).await?;
        Ok(cluster)
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
        let tail = |member: &Member| {
            let log = member.program.output();
            let lines: Vec<&str> = log.lines().collect();
            lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
        };
        self.members.iter().map(tail).collect::<Vec<_>>().join("\n--\n")
    }
}

impl Member {
    fn found(folder: &Path) -> anyhow::Result<Self> {
        let own = own_address(free_block()?);
        let name = "istiod-1";
        let data = folder.join(name);
        let settings = folder.join(format!("{name}.init.yaml"));
        let args =
            ["init", "--config", &settings.display().to_string(), "--data-dir", &data.display().to_string()];
        let (peer, xds) = (format!("{own}:15019"), format!("{own}:15012"));
        let args = [&args[..], &["--peer", &peer, "--xds", &xds]].concat();
        let (code, out, err) = program::run("istiod", &[], &args)?;
        ensure!(code == 0, "{code}: {out}{err}");
        Self::launch(folder, name, own, &[])
    }

    fn join(folder: &Path, name: &str, ticket: &str) -> anyhow::Result<Self> {
        Self::launch(folder, name, own_address(free_block()?), &["--join", ticket])
    }

    fn launch(folder: &Path, name: &str, own: Ipv4Addr, flags: &[&str]) -> anyhow::Result<Self> {
        let settings = folder.join(format!("{name}.yaml"));
        let yaml = format!(
            "dataDir: {}\nname: {name}\npeers: {{address: '{own}:15019', advertise: '{own}:15019'}}\n\
             xds: {{address: '{own}:15012', advertise: '{own}:15012'}}\nadmin: {{address: '{own}:15080', tls: false}}\n\
             metrics: {{address: '{own}:15014'}}\n",
            folder.join(name).display()
        );
        std::fs::write(&settings, yaml)?;
        let mut args = ["run", "--config", &settings.display().to_string()].map(str::to_owned).to_vec();
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let program = Program::start(&program::ours("istiod")?, folder, name, &args)?;
        Ok(Self { name: name.to_owned(), own, folder: folder.to_owned(), program })
    }

    /// Waits until it serves.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ready(&self) -> anyhow::Result<()> {
        eventually(PATIENCE, "a member is ready", || async {
            let ready = http::get(self.at(15080), "istiod", "/ready", &[]).await?;
            ensure!(ready.status == 200, "{ready:?}");
            Ok(())
        })
        .await
        .with_context(|| self.program.output())
    }

    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.own, port))
    }

    /// `kill -9`.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.program.kill()
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
        *self = Self::launch(&self.folder, &self.name, self.own, &[])?;
        self.ready().await
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
        let url = format!("http://{}", self.at(15080));
        let token = self.folder.join(&self.name).join("operator/admin-token").display().to_string();
        let envs = [("ISTIOCTL_SERVER", url.as_str()), ("ISTIOCTL_TOKEN_FILE", token.as_str())];
        // Whatever else goes on goes on.
        let (code, out, err) = tokio::task::block_in_place(|| program::run("istioctl", &envs, args))?;
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
        let answer = http::get(self.at(15014), "istiod", "/metrics", &[]).await?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.text());
        Ok(sum(&answer.text(), name, ""))
    }
}
