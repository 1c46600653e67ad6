// The reference, drawn by Swagger UI from the server's own OpenAPI document. Nothing is validated or fetched elsewhere.
SwaggerUIBundle({
  url: '/openapi.json',
  dom_id: '#swagger',
  deepLinking: true,
  validatorUrl: null,
  persistAuthorization: false,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: 0,
});
