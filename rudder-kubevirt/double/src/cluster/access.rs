//! Users of the cluster with limited rights: service accounts, and what RBAC grants them.

use super::{
    Cluster, apply,
    error::{Context, Error, Result},
};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
    rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject},
};
use kube::{
    Api, Resource,
    api::{ObjectMeta, PostParams},
};
use std::path::PathBuf;

/// Lifetime of a token, in seconds.
const TOKEN_LIFETIME: i64 = 24 * 60 * 60;

impl Cluster {
    /// Creates a service account that may do what `rules` grant in its namespace, and returns the path of a
    /// kubeconfig with a token for it. The namespace must exist. For an account that exists, the rules are
    /// replaced.
    ///
    /// # Errors
    ///
    /// The API server refuses the objects, or does not answer.
    pub async fn service_account(
        &self,
        name: &str,
        namespace: &str,
        rules: Vec<PolicyRule>,
    ) -> Result<PathBuf> {
        let client = self.client()?;
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        };
        let account = ServiceAccount { metadata: metadata.clone(), ..ServiceAccount::default() };
        apply(&Api::namespaced(client.clone(), namespace), name, &account).await?;
        let role = Role { metadata: metadata.clone(), rules: Some(rules) };
        apply(&Api::namespaced(client.clone(), namespace), name, &role).await?;
        let binding = RoleBinding {
            metadata,
            role_ref: role_ref(&Role::kind(&()), name),
            subjects: Some(vec![subject(name, namespace)]),
        };
        apply(&Api::namespaced(client, namespace), name, &binding).await?;
        self.service_account_kubeconfig(name, namespace).await
    }

    /// Grants rights in the whole cluster to a service account, instead of those that this method granted it before.
    ///
    /// # Errors
    ///
    /// The API server refuses the objects, or does not answer.
    pub async fn grant_in_cluster(&self, name: &str, namespace: &str, rules: Vec<PolicyRule>) -> Result<()> {
        let client = self.client()?;
        let role_name = format!("{namespace}-{name}");
        let metadata = ObjectMeta { name: Some(role_name.clone()), ..ObjectMeta::default() };
        let role = ClusterRole { metadata: metadata.clone(), rules: Some(rules), ..ClusterRole::default() };
        apply(&Api::all(client.clone()), &role_name, &role).await?;
        let binding = ClusterRoleBinding {
            metadata,
            role_ref: role_ref(&ClusterRole::kind(&()), &role_name),
            subjects: Some(vec![subject(name, namespace)]),
        };
        apply(&Api::all(client), &role_name, &binding).await
    }

    /// Returns the path of a new kubeconfig for a service account that exists, with its namespace as the
    /// default and a token that is valid for a day.
    ///
    /// # Errors
    ///
    /// The API server refuses a token, or does not answer.
    pub async fn service_account_kubeconfig(&self, name: &str, namespace: &str) -> Result<PathBuf> {
        let failed = || format!("cannot get a token for the service account {namespace}/{name}");
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client()?, namespace);
        let spec =
            TokenRequestSpec { expiration_seconds: Some(TOKEN_LIFETIME), ..TokenRequestSpec::default() };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let answer =
            accounts.create_token_request(name, &PostParams::default(), &request).await.context(failed)?;
        let status = answer.status.ok_or_else(|| Error::new(failed()))?;
        self.kubeconfig_for_token(&status.token, namespace)
    }
}

fn role_ref(kind: &str, name: &str) -> RoleRef {
    RoleRef { api_group: Role::group(&()).into_owned(), kind: kind.to_owned(), name: name.to_owned() }
}

fn subject(name: &str, namespace: &str) -> Subject {
    Subject {
        kind: ServiceAccount::kind(&()).into_owned(),
        name: name.to_owned(),
        namespace: Some(namespace.to_owned()),
        ..Subject::default()
    }
}
